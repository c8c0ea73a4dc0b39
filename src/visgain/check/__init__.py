"""`visgain check`: what would happen, said before it does.

    scan (every row, nothing decoded)  ->  reading (some rows, as the model would read them)
         ->  measure (a few of them scored)  ->  findings  ->  view

Each stage gathers facts and judges nothing. What is wrong with them is said by small functions, facts to Finding or
None, in the lists `data_checks.CHECKS`, `label_checks.CHECKS` and `run_checks.CHECKS`: to add a check, add one there.
"""
