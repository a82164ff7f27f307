"""Chat templates as published with real models, rendered as transformers renders them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from vlm_edge_runtime.errors import BundleError, PromptError
from vlm_edge_runtime.text import ChatTemplate, find_chat_template, load_chat_template, load_tokenizer

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

TEMPLATE_FILES = Path(__file__).parent / "chat_templates"
BLOCKS = (
    "{% for m in messages %}\n    {% if m.role == 'user' %}\n  [{{ m.content }}]\n    {% endif %}\n{% endfor %}\n"
    "{{ dict(a=1) | tojson }}"
)
REASONING = "{% for m in messages %}{{ m.reasoning_content | default('-') }}/{{ m.thinking | default('-') }}{% endfor %}"
TEMPLATES = {path.stem: path.read_text() for path in sorted(TEMPLATE_FILES.glob("*.jinja"))}
LLAMA_3, SMOLVLM = TEMPLATES["llama_3"], TEMPLATES["smolvlm"]
TEMPLATES |= {"blocks": BLOCKS, "reasoning": REASONING}


def say(role: str, *parts: str | dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": one} if isinstance(one, str) else one for one in parts], **more}


IMAGE = {"type": "image"}
CHATS = {
    "one image": [say("user", IMAGE, "What is <b>this</b> & 'that'?")],
    "two images, several turns": [
        say("user", "Compare ", IMAGE, " and ", IMAGE, "."),
        say("assistant", "  Both are red. "),
        say("user", "Sure?"),
    ],
    "text only, umlauts": [say("user", "Größe? 🙂")],
    "an image inside": [say("user", {"type": "image", "image": np.zeros((2, 2, 3), np.uint8)}, "Hm?", name=None)],
    "strings": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi\n"}],
    "reasoning": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning": "why"}],
}


def expected(template: str, chat: list[dict[str, Any]], **options: Any) -> str:
    dropped = [{key: value for key, value in message.items() if value is not None} for message in chat]
    rendered, _ = render_jinja_template(conversations=[dropped], chat_template=template, **TOKENS, **options)
    return str(rendered[0])


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "options", [{}, {"add_generation_prompt": True}, {"add_vision_id": True, "date_string": "1 May 2030"}], ids=str
)
def test_renders_as_transformers_does(name: str, chat: str, options: dict[str, Any]) -> None:
    template = ChatTemplate(TEMPLATES[name], TOKENS)
    ours = {"add_generation_prompt": False, **options}
    try:
        reference = expected(TEMPLATES[name], CHATS[chat], **options)
    except Exception as refusal:
        with pytest.raises(PromptError):
            template.render(CHATS[chat], **ours)
        assert name in ("llava", "smolvlm"), refusal  # they want lists of parts, and strings are none
        return
    assert template.render(CHATS[chat], **ours) == reference


def test_tools_and_documents() -> None:
    tools = [{"type": "function", "function": {"name": "größe", "parameters": {"type": "object", "properties": {}}}}]
    chat = [say("user", "go")]
    template = ChatTemplate(LLAMA_3, TOKENS)
    assert template.render(chat, tools=tools) == expected(LLAMA_3, chat, tools=tools, add_generation_prompt=True)
    listing = "{% for d in documents %}{{ d.title }};{% endfor %}"
    documents = [{"title": "a", "text": "b"}]
    assert ChatTemplate(listing).render(chat, documents=documents) == "a;"


@pytest.mark.parametrize("name", ["llava", "smolvlm", "qwen2_vl", "llama_3"])
@pytest.mark.parametrize("final", ["The answer is", "The answer is ", " The"])
def test_going_on_with_the_last_message(name: str, final: str) -> None:
    chat = [say("user", IMAGE, "What?"), say("assistant", final)]
    reference = expected(TEMPLATES[name], chat, continue_final_message=True)
    rendered = ChatTemplate(TEMPLATES[name], TOKENS).render(chat, add_generation_prompt=False, continue_final_message=True)
    assert rendered == reference
    assert chat[1]["content"][0]["text"] == final


def test_openai_parts_become_images() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,xx"}}, {"type": "text", "text": "?"}]
    template = ChatTemplate(SMOLVLM)
    assert template.render([{"role": "user", "content": parts}]) == template.render([say("user", IMAGE, "?")])


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in CHECKPOINTS.glob("*/chat_template.jinja")))
def test_checkpoints(folder: str) -> None:
    tokenizer = load_tokenizer(CHECKPOINTS / folder)
    template = load_chat_template(CHECKPOINTS / folder, tokenizer.special_tokens)
    reference = AutoTokenizer.from_pretrained(CHECKPOINTS / folder)
    assert template is not None
    for chat in CHATS.values():
        expected = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert template.render(chat) == expected


def test_where_templates_are_found(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(
        '{"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]}'
    )
    several = load_chat_template(tmp_path)
    assert several is not None
    chat = [say("user", "x")]
    assert several.render(chat) == "D"
    assert several.render(chat, tools=[{}]) == several.render(chat, template="tool_use") == "T"
    with pytest.raises(PromptError, match="no chat template 'rag'; the checkpoint has default, tool_use"):
        several.render(chat, template="rag")
    (tmp_path / "chat_template.json").write_text('{"chat_template": "J"}')
    assert find_one(tmp_path) == "J"
    (tmp_path / "chat_template.jinja").write_text("R")
    assert find_one(tmp_path) == "R"
    (tmp_path / "processor_config.json").write_text('{"chat_template": "P"}')
    assert find_one(tmp_path) == "P"
    assert find_chat_template(processor_config={"chat_template": None}, tokenizer_config={"chat_template": {"default": "x"}}) == {
        "default": "x"
    }
    (tmp_path / "chat_template.json").write_text("{")
    with pytest.raises(BundleError, match="not JSON"):
        load_chat_template(tmp_path)


def find_one(folder: Path) -> str:
    template = load_chat_template(folder)
    assert template is not None
    return template.sources["default"]


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (LLAMA_3, [say("assistant", "no")], "refused the messages: Conversation roles must alternate"),
        ("{{ messages[3].content }}", [say("user", "x")], "refused the messages: .*no element 3|refused the messages"),
        ("{{ messages[0].content + 1 }}", [say("user", "x")], "failed on the messages"),
        ("{{ 'a' * 10 ** 15 }}", [say("user", "x")], "failed on the messages .MemoryError"),
        ("{{ 1 / 0 }}", [say("user", "x")], "ZeroDivisionError"),
        ("{{ messages[0].__class__.__mro__ }}", [say("user", "x")], "refused"),
        ("{{ ''.__class__ }}x{{ namespace(_a=1) }}", [say("user", "x")], "underscore|refused"),
        ("{{ messages.append(1) }}", [say("user", "x")], "refused"),
        ("{{ range(999999999) | list }}", [say("user", "x")], "failed|refused"),
        ("x", [], "no messages"),
        ("x", ["hello"], "must be a dictionary"),
    ],
)
def test_refusals(template: str, chat: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        ChatTemplate(template, TOKENS).render(chat)


def test_going_on_is_refused_when_it_makes_no_sense() -> None:
    chat = [say("user", "q"), say("assistant", "a")]
    with pytest.raises(PromptError, match="add_generation_prompt=False"):
        ChatTemplate(SMOLVLM).render(chat, continue_final_message=True)
    with pytest.raises(PromptError, match="leaves out"):
        ChatTemplate("fixed").render(chat, continue_final_message=True, add_generation_prompt=False)
    with pytest.raises(PromptError, match="no text to go on from"):
        ChatTemplate(SMOLVLM).render([say("user", IMAGE)], continue_final_message=True, add_generation_prompt=False)


def test_invalid_jinja_is_a_damaged_bundle() -> None:
    with pytest.raises(BundleError, match=r"'default' is not valid Jinja, line 2"):
        ChatTemplate("\n{% if %}")
