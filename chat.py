"""Ask a trained model about a picture; the answer is written as it comes.

python chat.py run=runs/pocket-ldpv2-v2-unfreeze_llm-s0 image=cat.png prompt="What is this?"
python chat.py run=<folder> image=cat.png                  asks for questions until an empty line
python chat.py run=<released MobileVLM folder> image=cat.png
"""

from __future__ import annotations

from mvlm.cli import script


def main(cfg) -> None:
    from mvlm.chat import Chat

    chat = Chat.open(cfg.run, max_new_tokens=cfg.max_new_tokens)
    chat.look(cfg.image)
    if cfg.prompt is not None:
        return chat.say(cfg.prompt)
    while question := input("> ").strip():
        chat.say(question)


if __name__ == "__main__":
    script(main, "chat")
