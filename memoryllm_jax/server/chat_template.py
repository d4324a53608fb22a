"""The chat template that a tokenizer brings, rendered as transformers does.

A template is code that comes with a model, so it runs in jinja2's sandbox, and sees plain JSON values only. Source:
transformers 5, utils/chat_template_utils.py.
"""

import datetime
import json
from collections.abc import Callable

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from memoryllm_jax.common import records
from memoryllm_jax.common.errors import UserError, one_line
from memoryllm_jax.data.tokenizer import Tokenizer

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class _Named(records.Record):
    """One of several templates in a tokenizer_config.json."""

    name: str
    template: str


class _Added(records.Record):
    content: str


class _Settings(records.Record):
    """What is read of a tokenizer_config.json or special_tokens_map.json."""

    chat_template: str | list[_Named] | None = None
    bos_token: str | _Added | None = None
    eos_token: str | _Added | None = None
    unk_token: str | _Added | None = None
    sep_token: str | _Added | None = None
    pad_token: str | _Added | None = None
    cls_token: str | _Added | None = None
    mask_token: str | _Added | None = None

    def special(self) -> dict[str, str]:
        """The texts of the special tokens that are named."""
        found = {name: getattr(self, name) for name in _SPECIAL}
        texts = {name: token.content if isinstance(token, _Added) else token for name, token in found.items()}
        return {name: text for name, text in texts.items() if text is not None}


class ChatTemplate:
    """Makes the text of a prompt from the messages of a chat.

    Args:
      source: the template.
      special: {"bos_token": text, ...}, which the template may read.
    Raises: UserError if the template is not valid.
    """

    def __init__(self, source: str, special: dict[str, str]):
        self._special = special
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"chat template: expected a valid one, found: {one_line(error, 300)}") from error

    def render(self, messages: list[dict]) -> str:
        """The prompt of these messages, which ends where the assistant's answer begins.

        Args:
          messages: each with a role and a content, as JSON.
        Raises: UserError with the template's own words, if it refuses the messages.
        """
        plain = [{name: value for name, value in message.items() if value is not None} for message in messages]
        try:
            return self._template.render(
                messages=[_with_reasoning(message) for message in plain],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special,
            )
        except Exception as error:  # what a template may raise is not limited to jinja2's errors
            raise UserError(f"the model's chat template refuses them: {one_line(error, 300)}") from error


def of(files: dict[str, str], tokenizer: Tokenizer, where: str) -> ChatTemplate | None:
    """The chat template among the kept files of an imported model, or None.

    Args:
      files: {name: text}; as in transformers, chat_template.jinja goes before tokenizer_config.json.
      tokenizer: its special tokens have the texts that no file names.
      where: the checkpoint's folder, for error messages.
    Raises: UserError for files that cannot be read.
    """
    settings = {
        name: records.parse(_Settings, files.get(name) or "{}", f"{where}: source: files: {name}")
        for name in ("special_tokens_map.json", "tokenizer_config.json")
    }
    found = files.get("chat_template.jinja") or settings["tokenizer_config.json"].chat_template
    if isinstance(found, list):
        found = {each.name: each.template for each in found}.get("default")
    if not found:
        return None
    special = _spelled(tokenizer)
    for each in settings.values():
        special |= each.special()
    return ChatTemplate(found, special)


def _spelled(tokenizer):
    """The texts of bos and eos, as far as the tokenizer has them as special tokens."""
    spellings = {id: spelling for spelling, id in tokenizer.special_tokens.items()}
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    return {name: spellings[id] for name, id in ids.items() if id in spellings}


def _with_reasoning(message: dict) -> dict:
    """The message with its reasoning under both names that templates read."""
    if "reasoning_content" not in message:
        return message
    return {"thinking": message["reasoning_content"], **message}


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment of transformers: its settings, filters and globals."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


class _Generation(jinja2.ext.Extension):
    """{% generation %}, which marks what the assistant wrote for training. Here its body is rendered as it is."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """The global `dict`, without the attributes by which a template could reach Python's own types."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args, **kwargs):
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """The global `namespace`, whose attributes cannot be those that Python reserves."""

    def __init__(*args, **kwargs):  # not `self`, so that a template can name an attribute so
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name, value):
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name):
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"expected an attribute without _ before it, found {name!r}")


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # jinja2's own filter escapes what is special in HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
