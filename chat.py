"""Ask a trained model about a picture; the answer is written as it comes.

python chat.py run=runs/pocket-ldpv2-v2-unfreeze_llm-s0 image=cat.png prompt="What is this?"
python chat.py run=<folder> image=cat.png                  asks for questions until an empty line
python chat.py run=<released MobileVLM folder> image=cat.png
python chat.py gguf=<run>/gguf/q4_k image=cat.png          exported files, answered by llama.cpp
python chat.py gguf=<run>/gguf/q4_k serve=true             the same on a page in the browser, on this machine alone
"""

from __future__ import annotations

from mvlm.cli import script


def main(cfg) -> None:
    if (cfg.run is None) == (cfg.gguf is None):
        raise ValueError("name a model: run=<run folder or released checkpoint>, or gguf=<folder that export.py wrote>")
    if cfg.serve and cfg.gguf is None:
        raise ValueError(
            "serve=true is llama.cpp's server, for exported files: python export.py run=<folder>, then gguf="
        )
    if cfg.gguf is not None:
        from mvlm.export.talk import browser, terminal

        return browser(cfg) if cfg.serve else terminal(cfg)
    from mvlm import build
    from mvlm.chat import Chat, converse

    chat = Chat.open(cfg.run, max_new_tokens=cfg.max_new_tokens)
    chat.model.to(build.device(cfg.device), build.autocast_type(build.precision(cfg.precision, cfg.device)))
    converse(chat, cfg.image, cfg.prompt)


if __name__ == "__main__":
    script(main, "chat")
