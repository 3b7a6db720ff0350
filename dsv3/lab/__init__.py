"""The ablation lab: a question is a folder, an arm a diff, an answer a table.

`sweep` is the algebra that an experiment's `sweep.py` is written in,
`experiment` reads it, `local` runs it, `results` keeps a line a run, `compare`
and `bootstrap` say what the lines show, `plots` and `page` show it.
"""
