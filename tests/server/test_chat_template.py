"""Chat templates: texts and ids of transformers, what a template must not do, and where it comes from."""

import json

import pytest

pytest.importorskip("jinja2", reason="needs the extra serve")

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data.tokenizer import Tokenizer
from memoryllm_jax.server import chat_template

# Shaped as those of real models: how they loop, trim, name special tokens, and refuse.
TEMPLATES = {
    "qwen2": """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{
'<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\\n'
+ message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{
'<|im_start|>assistant\\n' }}{%
endif %}""",
    "llama3": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + eos_token }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
        + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
""",
    "mistral": """{{ bos_token }}{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ '[INST] ' + message['content'] + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {{ message['content'] + eos_token}}
    {% endif %}
{% endfor %}""",
    "qwen3": """{%- macro head(role) %}{{- '<|im_start|>' + role + '\\n' }}{%- endmacro %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and message.content is string %}
        {%- set ns.last_query_index = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "system" %}{{- message | tojson(indent=1) }}{%- continue %}{%- endif %}
    {%- set content = message.content %}
    {%- set reasoning_content = message.reasoning_content if message.reasoning_content is defined else '' %}
    {{- head(message.role) }}
    {%- if '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if reasoning_content and loop.index0 < ns.last_query_index %}
        {{- '<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- head('assistant') }}{%- endif %}
""",
    "smollm3": """{% for m in messages %}
  {% if m.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}

  {% else %}
<|im_start|>{{ m.role }}
{{ dict(text=m.content)['text'] | replace('x', 'y') }}<|im_end|>
  {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
""",
}
CHATS = [
    [{"role": "user", "content": "Is <b>1 < 2</b>? \n"}],
    [
        {"role": "system", "content": 'Answer "briefly" — that\'s all. '},
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "<think>x</think>\n\nIt is 4.", "reasoning_content": "\nadd\n"},
        {"role": "user", "content": "And <|im_end|> 3 + x?"},
    ],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}, {"role": "user", "content": "b"}],
]


def byte_level_tokenizer():
    """A tokenizer.json of all bytes and some special tokens, as text."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"])
    return made.to_str()


def test_texts_and_ids_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", "5.0", reason="needs the extra hf")
    (tmp_path / "tokenizer.json").write_text(byte_level_tokenizer())
    ours = Tokenizer("hf", byte_level_tokenizer().encode(), "here")
    refused = 0
    for name, template in TEMPLATES.items():
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": {"content": "</s>", "__type": "AddedToken"},
            "chat_template": template,
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        made = chat_template.of({"tokenizer_config.json": json.dumps(settings)}, ours, "DIR")
        for chat in CHATS:
            try:
                expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            except Exception as error:
                with pytest.raises(UserError, match="the model's chat template refuses them"):
                    made.render(chat)
                refused += 1
                assert "alternate" in str(error) or "content" in str(error)
                continue
            assert made.render(chat) == expected, name
            ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            assert ours.encode_special(expected) == ids, name
    assert 1 <= refused <= 6


@pytest.mark.parametrize(
    "template, problem",
    [
        ("{{ raise_exception('only one user') }}", "refuses them: only one user"),
        ("{{ messages.append(1) }}", "refuses them: access to attribute 'append'"),
        ("{{ ''.__class__.__mro__ }}{{ messages[0].content.__class__ }}", "refuses them: .*__class__"),
        ("{{ namespace(__x=1) }}", "refuses them: expected an attribute without _"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "refuses them: Range too big"),
        ("{% if %}", "chat template: expected a valid one, found: Expected an expression"),
    ],
)
def test_templates_are_sandboxed_and_refuse_in_their_own_words(template, problem):
    with pytest.raises(UserError, match=problem):
        chat_template.ChatTemplate(template, {}).render([{"role": "user", "content": "a"}])


def test_a_template_is_found_where_transformers_looks():
    tokenizer = Tokenizer("hf", byte_level_tokenizer().encode(), "here")
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D{{ bos_token }}"}]
    config = {"tokenizer_config.json": json.dumps({"chat_template": several, "model_max_length": 1e30})}
    assert chat_template.of(config, tokenizer, "DIR").render([]) == "D<s>"
    assert chat_template.of(config | {"chat_template.jinja": "J\n{{ eos_token }}"}, tokenizer, "DIR").render([]) == (
        "J\n</s>"
    )
    assert chat_template.of({}, tokenizer, "DIR") is None
    with pytest.raises(UserError, match=r"^DIR: source: files: tokenizer_config.json: chat_template: expected"):
        chat_template.of({"tokenizer_config.json": '{"chat_template": 1}'}, tokenizer, "DIR")
