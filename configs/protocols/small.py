"""Small: which token memories are worth their parameters, at four sizes and three vocabularies, on two CPU cores.

    nice python -m memoryllm_jax.compare --protocol=configs/protocols/small.py --workdir=DIR --texts=TEXTS --jobs=2

benchmarks/pages.py makes TEXTS: 33 M tokens at 512 ids, 17 M at 4,096 and 14 M at 32,000, so that no run reads a
sequence twice. The first experiments can be reported while the others train.
"""

from memoryllm_jax.experiments.protocol import Contrast, Experiment, Protocol, Sweep, Variant

SIZES = {  # heads of 16
    "S": {"model.dim": 64, "model.layers": 4, "model.heads": 4},
    "M": {"model.dim": 96, "model.layers": 6, "model.heads": 6},
    "L": {"model.dim": 128, "model.layers": 6, "model.heads": 8},
    "XL": {"model.dim": 192, "model.layers": 6, "model.heads": 12},
}
# FFN-C of flex-B stands beside attention. So it does in what flex-B is compared with, so that memories alone differ.
BESIDE = {"model.compute_input": "block_input"}
PAPER = ("base", "memory", "flex-3")  # its architectures
CORE = (*PAPER, "no-memory-3", "rows-3")  # with three seeds after 4 M tokens
MAIN = (*CORE, "no-memory-0", "flex-3-shared")
PEERS = ("ple-3", "value-3", "bov-3", "bigram-3")
SHARES = ("flex-1", "flex-2", "flex-6")
CONTROLS = ("flex-3-permuted", "flex-3-frozen", "memory-shared", "memory-permuted", "memory-frozen")
# At size S base has a lower best rate than models with a memory, and an uneven sweep: is it behind because of that?
STABLE = {f"{variant}-qk-norm": variant for variant in PAPER}
FASTER = {f"base-rate-x{factor}": factor for factor in (2, 4)}
VARIANTS = (
    *map(Variant, (*PAPER, "no-memory-0")),
    *(Variant(name, fields=BESIDE) for name in ("no-memory-3", "rows-3", *PEERS)),
    *map(Variant, SHARES),
    *(
        Variant(f"{variant}-{rows}", variant, {"model.rows": rows}, control_of=variant)
        for variant in ("memory", "flex-3")
        for rows in ("permuted", "shared", "frozen")
    ),
    *(Variant(name, variant, {"model.qk_norm": True}, control_of=variant) for name, variant in STABLE.items()),
    *(Variant(name, "base", rate_of="base", rate_factor=factor, control_of="base") for name, factor in FASTER.items()),
)
CONTRASTS = (
    Contrast("MemoryLLM or base, at equal total parameters?", "memory", "base"),
    Contrast("Flex-MemoryLLM or base, at equal total parameters?", "flex-3", "base"),
    *(
        Contrast("Flex-MemoryLLM with another beta or base, at equal total parameters?", share, "base")
        for share in SHARES
    ),
    Contrast("MemoryLLM or base with QK-norm, at equal total parameters?", "memory-qk-norm", "base-qk-norm"),
    Contrast("Flex-MemoryLLM or base with QK-norm, at equal total parameters?", "flex-3-qk-norm", "base-qk-norm"),
    *(Contrast("Is base better at a higher rate than its sweep's, in longer runs?", name, "base") for name in FASTER),
    Contrast("Is FFN-M worth anything to a model with FFN-C?", "flex-3", "no-memory-3"),
    Contrast("Is FFN-M worth anything to a model without FFN-C?", "memory", "no-memory-0"),
    Contrast("Is FFN-M better than a plain table?", "flex-3", "rows-3"),
    Contrast("Is a plain table worth anything?", "rows-3", "no-memory-3"),
    Contrast("Are per-layer embeddings worth anything?", "ple-3", "no-memory-3"),
    Contrast("Are value embeddings worth anything?", "value-3", "no-memory-3"),
    Contrast("Is a Bank of Values worth anything?", "bov-3", "no-memory-3"),
    Contrast("Is a table of bigrams worth anything?", "bigram-3", "no-memory-3"),
    Contrast("A planted useless memory: one row for all tokens", "flex-3-shared", "no-memory-3"),
    Contrast("A planted useless memory in a model without FFN-C", "memory-shared", "no-memory-0"),
    Contrast("Does FFN-M gain from the token's own embedding?", "flex-3", "flex-3-permuted"),
    Contrast("Does FFN-M gain from the token's own embedding?", "memory", "memory-permuted"),
    Contrast("Is FFN-M better than rows drawn at random?", "flex-3", "flex-3-frozen"),
    Contrast("Is FFN-M better than rows drawn at random?", "memory", "memory-frozen"),
    Contrast("Do the rows say anything of their tokens?", "flex-3", ""),
)
SEEDS = (0, 1, 2)
M = 1e6


def get_protocol() -> Protocol:
    return Protocol(
        config="configs/tiny.py",
        fields={
            "batch_size": 8,  # 2,048 tokens a step, so that the shortest runs have 489 steps
            "seq_len": 256,
            "model.loss_chunk": 128,  # logits that fit a cache
            "data.epochs": 1,
            "eval.every": 1_000_000,  # at the end only, and on little: the runs are compared by their scores
            "eval.batches": 32,
            "checkpoint.every": 100_000,
            "checkpoint.keep": 1,
            "log.every": 100,
            "log.tensorboard": False,
            "sample.tokens": 0,
        },
        sizes=SIZES,
        vocabularies={str(ids): f"sentencepiece:train:{ids}" for ids in (512, 4096, 32000)},
        variants=VARIANTS,
        sweep=Sweep(
            tokens={"512": 2 * M, "4096": 1 * M, "32000": 1 * M},  # about equally much text: 3, 3 and 4 MB
            rates=(2e-3, 4e-3, 8e-3),
            sizes={"S": "S", "M": "M", "L": "L", "XL": "L"},
        ),
        experiments=(
            # 4 and 8 M tokens are 20 and 40 for each parameter of attention and FFNs in base, size S. With embedding
            # and head, 8 M are 30 for each of its parameters at 512 ids.
            Experiment("letters", MAIN, ("S",), ("512",), (1 * M, 2 * M, 4 * M)),
            Experiment("syllables", MAIN, ("S",), ("4096",), (1 * M, 2 * M, 4 * M)),
            Experiment("seeds", MAIN, ("S",), ("512", "4096"), (2 * M,), SEEDS),
            Experiment("words", (*PAPER, "no-memory-3"), ("S",), ("32000",), (1 * M,), SEEDS),
            Experiment("stability", tuple(STABLE), ("S",), ("4096",), (1 * M, 2 * M)),
            Experiment("rates", tuple(FASTER), ("S",), ("4096",), (2 * M, 4 * M)),
            Experiment("shares", SHARES, ("S",), ("4096",), (1 * M, 2 * M)),
            Experiment("controls", CONTROLS, ("S",), ("4096",), (1 * M, 2 * M)),
            Experiment("long", PAPER, ("S",), ("512", "4096"), (8 * M,)),
            Experiment("long-seeds", CORE, ("S",), ("512", "4096"), (4 * M,), SEEDS),
            Experiment("peers", PEERS, ("S",), ("4096",), (1 * M, 2 * M, 4 * M)),
            Experiment("sizes", PAPER, ("M", "L"), ("4096",), (1 * M, 2 * M, 4 * M)),
            Experiment("worth", ("no-memory-3", "rows-3"), ("M",), ("4096",), (1 * M, 2 * M, 4 * M)),
            Experiment("left-out", PAPER, ("XL",), ("4096",), (2 * M,)),
        ),
        contrasts=CONTRASTS,
        held_out_sizes=("XL",),
    )
