"""Prompt templates, character for character."""

from pathlib import Path

import pytest

from polarity.data import TEMPLATES, apply_template, load_template
from polarity.errors import UserError

BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
CHATML = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{problem}\n"
EXACT = {
    "a3po": f"User:\n{{problem}}\n{BOXED}\n\nAssistant:",
    "qwen": f"{CHATML}{BOXED}<|im_end|>\n<|im_start|>assistant\n",
    "qwen3_no_thinking": f"{CHATML}{BOXED}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n",
    "qwen3_no_thinking_blank_line": f"{CHATML}{BOXED}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "dapo": "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\n"
    'Remember to put your answer on its own line after "Answer:".',
    "llama": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful assistant.<|eot_id|>"
    f"<|start_header_id|>user<|end_header_id|>\n\n{{problem}}\n{BOXED}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "simple": "Question:\n{problem}\nAnswer:\nLet's think step by step.\n",
    "plain": "{problem}",
}


def test_every_template_is_exact():
    assert {name: load_template(name) for name in TEMPLATES} == EXACT


def test_replacement_is_literal():
    assert apply_template("Q: {problem} {x}", "{y} {problem} %s \\1") == "Q: {y} {problem} %s \\1 {x}"
    for name in TEMPLATES:
        before, after = load_template(name).split("{problem}")
        assert apply_template(load_template(name), "{a} {problem} {}") == before + "{a} {problem} {}" + after


def test_own_files_and_inline_text(tmp_path: Path):
    path = tmp_path / "mine.txt"
    path.write_bytes(b"\xef\xbb\xbfQ: {problem}\r\nA:\r\n")
    assert load_template(str(path)) == "Q: {problem}\nA:"
    path.write_text("Q: {problem}\nA:")
    assert load_template(str(path)) == "Q: {problem}\nA:"
    assert load_template("{problem} =\n") == "{problem} =\n"


def test_refused(tmp_path: Path):
    path = tmp_path / "mine.txt"
    path.write_text("Q: {question}")
    with pytest.raises(UserError, match=r"mine\.txt does not hold \{problem\}"):
        load_template(str(path))
    with pytest.raises(UserError, match=r"'qwne' is no file, no template \(did you mean 'qwen'"):
        load_template("qwne")
    with pytest.raises(UserError, match="is no file"):
        load_template(str(tmp_path))
