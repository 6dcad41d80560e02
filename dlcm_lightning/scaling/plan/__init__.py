"""`dlcm plan`: a budget or a size -> a whole run, as a run file, and what there is to know of it before it runs.

    request.py    what was asked for, checked
    measured.py   a measured MFU from a run or a benchmark
    choice.py     model and tokens: by a fitted law, or by convention
    schedule.py   the run around them: batch, steps, warm-up, intervals
    partners.py   the dense models to compare it with
    report.py     what is printed
    run_file.py   what is written
    plan.py       all of it

Nothing here loads torch or SciPy: a plan takes less than a second.
"""
