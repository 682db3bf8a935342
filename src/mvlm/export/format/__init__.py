"""What can be handed over, a format a file: `python export.py format=<file>`. To add one, write `x.py` here with

place(cfg) -> str                   where below the run's folder it goes; refuses keys that make no sense, before anything is loaded
check(source, cfg) -> int           bytes of weights that it will write at most; refuses a model that the format can't hold
write(folder, source, cfg)          fills the folder, a manifest.json among its files; raises `Unproven` if what it wrote computes
                                    something else
"""
