"""A sweep over the architectures of transformers: a tiny random model of each goes through every stage of reallm.

    python -m benchmarks.architectures [NAMES]

`cases` lists the architectures, `shrink` and `settings` make their configurations small, `build` makes the models,
`pipeline` runs the stages, `processes` runs each model in a process of its own, and `page` writes the documentation.
"""
