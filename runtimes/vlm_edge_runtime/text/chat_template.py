"""Chat templates: Jinja in a sandbox, with exactly the environment that transformers gives them.

A template comes with the checkpoint and is not trusted: it runs in Jinja's immutable sandbox and sees plain data only (images in
a message become inert placeholders, which is enough for a template that asks whether there is one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_edge_runtime.errors import BundleError, PromptError

from .files import Source, optional_json, side_files

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]
"""`{"role": "user", "content": "…" or [{"type": "image"}, {"type": "text", "text": "…"}]}`, and what else a template reads."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplate:
    """One or several named templates of a checkpoint; `special_tokens` are the variables `bos_token`, `eos_token` …"""

    def __init__(self, source: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None) -> None:
        """Raises BundleError when a template is not valid Jinja."""
        self.sources: dict[str, str] = {"default": source} if isinstance(source, str) else dict(source)
        self._special_tokens = dict(special_tokens or {})
        import jinja2  # here and not above: most of what imports this module renders nothing

        from .chat_jinja import environment

        compiler = environment()
        self._refusal: type[jinja2.TemplateError] = jinja2.TemplateError
        self._templates: dict[str, jinja2.Template] = {}
        for name, text in self.sources.items():
            try:
                self._templates[name] = compiler.from_string(text)
            except jinja2.TemplateSyntaxError as error:
                raise BundleError(
                    f"the chat template '{name}' is not valid Jinja, line {error.lineno}: {error.message}"
                ) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt's text, image placeholders still one each.

        `continue_final_message`: the text ends where the last message's text ends, so that the model goes on with it.
        `tools`: JSON schemas. `template`: the name of one of several. Other keywords are variables of the template.

        Raises PromptError when the template refuses the messages, or fails on them.
        """
        if continue_final_message and add_generation_prompt:
            raise PromptError("continue_final_message goes on with the last message; set add_generation_prompt=False with it")
        chat = [self._message(message) for message in messages]
        if not chat:
            raise PromptError("there are no messages; expected at least one")
        continued = _mark_end(chat) if continue_final_message else ""
        context = {**self._special_tokens, **_plain(variables)}
        try:
            text = self._pick(template, tools).render(
                messages=chat,
                tools=_plain(tools),
                documents=_plain(documents),
                add_generation_prompt=add_generation_prompt,
                **context,
            )
        except self._refusal as error:
            raise PromptError(f"the chat template refused the messages: {error.message or type(error).__name__}") from error
        except (
            TypeError,
            ValueError,
            KeyError,
            IndexError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            MemoryError,
        ) as error:
            raise PromptError(
                f"the chat template failed on the messages ({type(error).__name__}: {error}); it may want another form of content"
            ) from error
        return _cut_at_end(text, continued) if continue_final_message else text

    def _pick(self, name: str | None, tools: object) -> jinja2.Template:
        if name is None:
            name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise PromptError(f"there is no chat template '{name}'; the checkpoint has {', '.join(sorted(self._templates))}")
        return self._templates[name]

    @staticmethod
    def _message(message: Message) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise PromptError(f"a message must be a dictionary of role and content; found {type(message).__name__}")
        # Absent and None mean the same to a caller, and templates test for presence.
        plain: dict[str, Any] = {str(key): _plain(value) for key, value in message.items() if value is not None}
        content = plain.get("content")
        if isinstance(content, list):
            plain["content"] = [_image_part(part) for part in content]
        reasoning = next((plain[name] for name in _REASONING if name in plain), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        return plain


def find_chat_template(
    *,
    jinja: str | None = None,
    json_file: Mapping[str, Any] | None = None,
    processor_config: Mapping[str, Any] | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
) -> str | dict[str, str] | None:
    """Where a checkpoint keeps its template: the first of these that has one, or None. Several templates come as a dictionary.

    The order: `processor_config.json`, `chat_template.jinja`, `chat_template.json`, `tokenizer_config.json`.
    """
    candidates: list[Any] = [(processor_config or {}).get("chat_template"), jinja, (json_file or {}).get("chat_template")]
    for found in (*candidates, (tokenizer_config or {}).get("chat_template")):
        if isinstance(found, str):
            return found
        if isinstance(found, Mapping):
            return {str(name): str(text) for name, text in found.items()}
        if isinstance(found, list):
            return {str(entry["name"]): str(entry["template"]) for entry in found}
    return None


def load_chat_template(source: Source, special_tokens: Mapping[str, str] | None = None) -> ChatTemplate | None:
    """The template of a bundle or of a checkpoint's folder, or None. Raises BundleError for files that cannot be read.

    `special_tokens`: the tokenizer's, which templates read as `bos_token` …
    """
    files = side_files(source)
    found = find_chat_template(
        jinja=files.read_text("chat_template.jinja") if files.has_file("chat_template.jinja") else None,
        json_file=optional_json(files, "chat_template.json"),
        processor_config=optional_json(files, "processor_config.json"),
        tokenizer_config=optional_json(files, "tokenizer_config.json"),
    )
    return None if found is None else ChatTemplate(found, special_tokens)


def _image_part(part: Any) -> Any:
    """OpenAI's `image_url` parts become Hugging Face's `image` parts, which is what templates know."""
    if isinstance(part, dict) and part.get("type") == "image_url" and "image_url" in part:
        found = part["image_url"]
        return {"type": "image", "url": found.get("url", "") if isinstance(found, dict) else found}
    return part


def _plain(value: Any) -> Any:
    """JSON types only; anything else becomes its type's name, so that a template can call nothing."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, np.generic):
        return _plain(value.item())
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return f"<{type(value).__name__}>"


def _mark_end(chat: list[dict[str, Any]]) -> str:
    """Puts a tag behind the last message's text and returns that text."""
    content = chat[-1].get("content")
    if isinstance(content, str):
        chat[-1]["content"] = content + _TAG
        return content
    for part in reversed(content if isinstance(content, (list, tuple)) else ()):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            found: str = part["text"]
            part["text"] = found + _TAG
            return found
    raise PromptError("continue_final_message is set, and the last message has no text to go on from")


def _cut_at_end(text: str, final: str) -> str:
    tag = _TAG.strip()
    if tag not in text or final.strip() not in text:
        raise PromptError("continue_final_message is set, and the chat template leaves out the last message's text")
    end = text.rindex(tag)
    # A template that trims messages took the tag's space away, and the message's own before it.
    return text[:end] if text[end : end + len(_TAG)] == _TAG else text[:end].rstrip()
