import datetime
import json

import pytest
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

from pomona.core.errors import CheckpointError, InvalidRequestError
from pomona.text.chat_template import ChatTemplate
from pomona.text.tokenizer import Tokenizer
from support.tokenizers import CHAT_TEMPLATE, make_tokenizer_files

MESSAGES = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": 'Say "<é>" & go'},
    {"role": "assistant", "content": "Ok"},
    {"role": "user", "content": "Again"},
]
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
LLAMA_2_STYLE = """{% if messages[0]['role'] == 'system' %}
{% set loop_messages = messages[1:] %}
{% set system_message = messages[0]['content'] %}
{% else %}
{% set loop_messages = messages %}
{% endif %}
{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
    {% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
{% generation %}{{ ' '  + message['content'] | trim + ' ' + eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}"""
TRICKY = """{%- set ns = namespace(count=0) -%}
{% for message in messages %}
  {%- if message.role == 'assistant' %}{% continue %}{% endif %}
  {%- set ns.count = ns.count + 1 %}
  {% if ns.count > 2 %}{% break %}{% endif %}
{{ message | tojson }}|{{ message.content | tojson(indent=2) }}|{{ {'b': 1, 'a': 'é'} | tojson(true, sort_keys=true) }}
{% set part = 'outside' %}{% generation %}{% set part = 'inside' %}{{ part }}{% endgeneration %}{{ part }}
{% endfor %}
{% if enable_thinking is defined and not enable_thinking %}no thoughts{% endif %}
{% if tools is none %}no tools{% endif %}{{ messages | length }}{{ 'x' if add_generation_prompt else 'y' }}"""


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, LLAMA_2_STYLE, TRICKY])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_rendering_equals_transformers(source, add_generation_prompt):
    expected, _ = render_jinja_template(
        conversations=[MESSAGES],
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=False,
        **SPECIALS,
    )
    template = ChatTemplate(source, SPECIALS)
    rendered = template.render(
        MESSAGES, add_generation_prompt=add_generation_prompt, variables={"enable_thinking": False}
    )
    assert rendered == expected[0]


# As in Qwen's templates: a message of another role is left out.
SELECTIVE = """{% for message in messages %}{% if message.role in ['system', 'user', 'assistant'] %}
{{ message.role }}: {{ message.content }}
{% endif %}{% endfor %}"""


def test_a_developer_message_is_a_system_message_where_the_template_knows_no_developer():
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert ChatTemplate(SELECTIVE, {}).render(messages) == "system: Be brief.\nuser: Hi\n"
    assert ChatTemplate("For developers: {{ messages[0].role }}", {}).render(messages) == "For developers: system"
    knowing = "{{ messages[0].role }}{% if messages[0].role == 'developer' %}!{% endif %}"
    assert ChatTemplate(knowing, {}).render(messages) == "developer!"
    assert messages[0]["role"] == "developer"


def test_fields_that_are_none_are_left_out_as_transformers_does(folder):
    source = "{% for message in messages %}{{ message | tojson }}{{ message.content }}{% endfor %}"
    messages = [{"role": "user", "content": "Hi", "name": None}, {"role": "assistant", "content": None}]
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    expected = theirs.apply_chat_template(messages, chat_template=source, tokenize=False)
    assert ChatTemplate(source, {}).render(messages) == expected


def test_strftime_now_is_offered():
    rendered = ChatTemplate("{{ strftime_now('%Y') }}", {}).render(MESSAGES)
    assert abs(int(rendered) - datetime.datetime.now().year) <= 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Only user roles') }}", "Only user roles"),
        ("{{ messages[9].content + 'x' }}", "messages"),
        ("{{ messages[0].content + 1 }}", "messages"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(10000000000) %}{% endfor %}", "[Rr]ange"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_template_that_refuses_names_messages(source, message):
    with pytest.raises(InvalidRequestError, match=message) as caught:
        ChatTemplate(source, {}).render(MESSAGES)
    assert caught.value.field == "messages"


@pytest.mark.parametrize("name", ["messages", "bos_token", "raise_exception", "add_generation_prompt"])
def test_a_client_cannot_replace_what_the_template_relies_on(name):
    with pytest.raises(InvalidRequestError, match=f"'{name}' is reserved"):
        ChatTemplate("x", SPECIALS).render(MESSAGES, variables={name: "y"})


def test_a_template_that_is_not_jinja_is_refused_at_start():
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: the chat template is not valid jinja2"):
        ChatTemplate("{% if %}", {})


def _load(folder, **config):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return ChatTemplate.load(folder, Tokenizer.load(folder))


def test_the_template_comes_from_the_config(folder):
    assert _load(folder).render([{"role": "user", "content": "hi"}]) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_template_file_wins_over_the_config(folder):
    (folder / "chat_template.jinja").write_text("file {{ eos_token }}")
    assert _load(folder).render(MESSAGES) == "file <|im_end|>"


def test_of_named_templates_the_default_is_taken(folder):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert _load(folder, chat_template=named).render(MESSAGES) == "d"


def test_named_templates_without_a_default_are_refused(folder):
    with pytest.raises(CheckpointError, match="no template is named 'default' among \\['tool_use'\\]"):
        _load(folder, chat_template=[{"name": "tool_use", "template": "t"}])


def test_a_template_of_another_type_is_refused(folder):
    with pytest.raises(CheckpointError, match="chat_template: must be a string"):
        _load(folder, chat_template=5)


def test_a_checkpoint_may_have_no_template(tmp_path):
    folder = make_tokenizer_files(tmp_path, chat_template=None)
    assert ChatTemplate.load(folder, Tokenizer.load(folder)) is None
