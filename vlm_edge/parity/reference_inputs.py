"""What transformers' `generate` takes for a prompt with pictures, whatever the model's processor looks like.

Processors differ in how they want to be called: with a text that has been through a chat template, with the plain question, with
image tokens in front of it, with text and pictures interleaved; some have no joint processor at all. Each documented way is
tried; the one whose tokens are those that the bundle reads is used. Where none gives them, the first that works is, and
the comparison of tokens says that they differ. Where the processor cannot be called at all (its class wants packages that are not
there), the reference reads the tokens of the bundle, with pictures from transformers' image processor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from PIL import Image

from vlm_edge.export.checkpoint import Checkpoint
from vlm_edge.export.trace import quiet
from vlm_edge_runtime.bundle.manifest import GenerativeContract
from vlm_edge_runtime.errors import ParityError
from vlm_edge_runtime.text.placeholders import placeholder_token

from .examples import Example
from .subject import Prepared

_BY_PARTS = "tokens of the bundle"
Inputs = dict[str, Any]
Ours = Callable[[Example], Prepared]
"""How a bundle reads an example."""


class ReferenceInputs:
    """Calls a checkpoint's processor. `ours`: how the bundle reads an example, where there is a bundle."""

    def __init__(self, checkpoint: Checkpoint, processor: Any, contract: GenerativeContract) -> None:
        self._checkpoint = checkpoint
        self._processor = processor
        self._contract = contract
        self._way: str | None = None
        self._rewritten = False
        """Whether the model's `generate` rewrites the processor's tokens, so that they say nothing by themselves."""
        self.ours: Ours | None = None
        self.decoder_prompt: Callable[[Inputs], list[int]] | None = None
        self.changed: Callable[[Inputs], Inputs] | None = None
        """What is done to a processor's inputs, where the reference is not the checkpoint as it is."""

    def __call__(self, example: Example) -> Inputs:
        """The inputs of one example. Raises ParityError when no way of calling the processor works."""
        said = ""
        first: Inputs | None = None
        ways = sorted(self._ways(example), key=lambda way: way[0] != self._way)  # the way that worked before, first
        for name, call in ways:
            if name == _BY_PARTS and first is not None:
                continue  # the processor can be called: that its tokens are others is for the comparison to say
            try:
                with quiet():
                    made = call()
                if name != _BY_PARTS and self._overlooks(name, made, example):
                    raise ParityError("The processor makes no room for several pictures.")
                if self.changed is not None and name != _BY_PARTS:
                    made = self.changed(made)
                known = name == self._way and self._rewritten
                same = known or self.ours is None or self._same_tokens(made, self.ours(example))
            except Exception as error:  # a way that this processor has not: whatever it raises, the next one is tried
                said = said or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            if same:
                self._way = name
                return made
            first = first or made
        if first is not None:
            return first
        raise ParityError(
            f"transformers' processor of {self._checkpoint.source.name} takes this example in no known way ({said})."
        )

    def _overlooks(self, name: str, made: Inputs, example: Example) -> bool:
        """Whether several pictures get other image tokens than all of them alone (BLIP-2's processor makes room for one)."""
        image = self._contract.modality("image")
        if len(example.images) < 2 or image is None or image.token_id is None or image.token_id not in (ids := _ids(made)):
            return False
        with quiet():
            alone = [dict(self._ways(Example((picture,), example.prompt)))[name]() for picture in example.images]
        return ids.count(image.token_id) != sum(_ids(one).count(image.token_id) for one in alone)

    def _same_tokens(self, made: Inputs, ours: Prepared) -> bool:
        if _ids(made) == ours.input_ids:
            return True
        self._rewritten = self.decoder_prompt is not None and self.decoder_prompt(made) == ours.decoder_ids
        return self._rewritten

    def _ways(self, example: Example) -> Iterator[tuple[str, Callable[[], Inputs]]]:
        pictures = [image.convert("RGB") for image in example.images]
        template, joint = self._checkpoint.chat_template, self._processor
        tokens = [placeholder_token(one.placeholder) for one in self._contract.modalities]
        mark = next((token for token in tokens if token), "")
        if self._by_decoder and self.ours is not None:
            yield _BY_PARTS, lambda: self._by_parts(example, pictures)
        if template:
            yield "chat template", lambda: self._of_messages(example, pictures)
        elif joint is not None:
            yield "text", lambda: self._joint(example.prompt, pictures)
            yield "image tokens, text", lambda: self._joint(mark * len(pictures) + example.prompt, pictures)
            completion = {"return_for_text_completion": True}  # without the mark that ends a turn (Chameleon's processor)
            yield "to be completed", lambda: self._joint(mark * len(pictures) + example.prompt, pictures, **completion)
            written = self._contract.prompt.template.replace("{images}", mark * len(pictures)).replace("{text}", example.prompt)
            yield "written out", lambda: self._joint(written, pictures, add_special_tokens=False)
            yield "interleaved", lambda: dict(joint(text=[[*pictures, example.prompt]], return_tensors="pt"))
        if self.ours is not None and not self._by_decoder:
            yield _BY_PARTS, lambda: self._by_parts(example, pictures)

    def _of_messages(self, example: Example, pictures: list[Image.Image]) -> Inputs:
        """A text that the template begins with the first special token gets no second one, as in `apply_chat_template`."""
        text = _rendered(self._processor, example)
        begin = self._checkpoint.tokenizer.bos_token
        return self._joint(text, pictures, **({"add_special_tokens": False} if begin and text.startswith(begin) else {}))

    @property
    def _by_decoder(self) -> bool:
        """Whether an image encoder feeds a decoder that reads the prompt, whose tokens then go to `generate` by no processor."""
        memory = self._contract.memory
        encodes = bool(getattr(self._checkpoint.model.config, "is_encoder_decoder", False))
        return encodes and memory is not None and memory.source == "features"

    def _joint(self, text: str, pictures: list[Image.Image], **more: Any) -> Inputs:
        call = partial(self._processor, text=[text], return_tensors="pt", **more)
        try:
            return dict(call(images=pictures or None))
        except ValueError:
            if len(pictures) < 2:
                raise
            return dict(call(images=[pictures]))  # those of one prompt in a list of their own

    def _by_parts(self, example: Example, pictures: list[Image.Image]) -> Inputs:
        """Pictures from the image processor, tokens as the bundle reads them: what a joint processor would put together."""
        assert self.ours is not None  # what made this a way
        ours, model = self.ours(example), self._checkpoint.model
        made = self._images(pictures) if pictures else {}
        ids = torch.tensor([ours.decoder_ids if self._by_decoder else ours.input_ids])
        if self._by_decoder:
            return {**made, "decoder_input_ids": ids} if ids.numel() else made
        image = self._contract.modality("image")
        known = _parameters(model)
        made |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        made |= self._instruction(example)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in known and image is not None and image.token_id is not None:
                made[name] = (ids == image.token_id).long()
        return {name: value for name, value in made.items() if name in known}

    def _instruction(self, example: Example) -> Inputs:
        """The prompt in the tokens of the tokenizers that read it beside the decoder's."""
        made: Inputs = {}
        for one in (modality.instruction for modality in self._contract.modalities):
            if one is not None:
                tokenizer = self._checkpoint.extra_tokenizers[one.tokenizer.removesuffix(".json")]
                told = tokenizer(example.prompt, return_tensors="pt")
                made |= {f"{one.prefix}{name}": told[name] for name in ("input_ids", "attention_mask")}
        return made

    def _images(self, pictures: list[Image.Image]) -> Inputs:
        processor = getattr(self._processor, "image_processor", None)
        if processor is None:
            raise ParityError(f"{self._checkpoint.source.name} has no image processor.")
        more = {} if self._by_decoder else _image_options(self._checkpoint)
        return dict(processor(images=pictures, return_tensors="pt", **more))


def _rendered(processor: Any, example: Example) -> str:
    content = [*({"type": "image"} for _ in example.images), {"type": "text", "text": example.prompt}]
    messages = [{"role": "user", "content": content}]
    if processor is None or not hasattr(processor, "apply_chat_template"):
        raise ParityError("There is no joint processor.")
    text: str = processor.apply_chat_template(messages, add_generation_prompt=True)
    return text


def _image_options(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the joint processor's class passes to the image processor besides its own options."""
    config = checkpoint.processor or {}
    merge, patch = config.get("spatial_merge_size"), config.get("patch_size")
    if isinstance(merge, int) and isinstance(patch, int):  # Pixtral's processor: sizes in patches after the merge
        return {"patch_size": {"height": merge * patch, "width": merge * patch}}
    import transformers

    try:
        kind = getattr(transformers, str(config.get("processor_class")))
    except (AttributeError, ImportError):  # without torchvision some classes cannot be imported
        return {}
    return dict(getattr(kind, "images_kwargs", None) or {})


def _parameters(model: Any) -> set[str]:
    """Names that the model's forward pass takes; of one with `**kwargs` also those its `generate` knows."""
    return {*inspect.signature(model.forward).parameters, *inspect.signature(model.generate).parameters}


def _ids(made: Inputs) -> list[int]:
    return [int(token) for token in made["input_ids"][0]] if "input_ids" in made else []
