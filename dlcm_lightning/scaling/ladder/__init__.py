"""`dlcm ladder run` and `dlcm ladder transfer`: a study is a YAML file that says what varies; its runs are trained one
after another by sub-processes, and what they measured is collected.

    study.py         what a study file holds, typed and checked
    study_file.py    reading one
    plan.py          the grid of a study as runs, each a whole configuration
    runs.py          what one sub-process has to do, and what has become of it, by the files of the run
    execute.py       sub-processes one at a time; stopping; who has what
    measurements.py  metrics.jsonl -> rows of the table
    table_file.py    the table of a study, csv; parquet_table.py the same as parquet
    study_run.py     `dlcm ladder run`
    descent.py       coordinate descent over learning rates
    minimum.py       where the loss over learning rates has its minimum
    sweeps.py        the points of the sweeps of a study
    transfer.py      `dlcm ladder transfer`; transfer_result.py, transfer_page.py, transfer_plot.py: its report

Nothing here loads torch: runs are other processes.
"""
