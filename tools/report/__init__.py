"""Write a page about a run: one HTML file that needs no network and can be mailed.

python -m tools.report RUN [RUN2 ...] writes RUN/report.html. A run is a pipeline or a single stage,
and may be finished, at work or dead. Several runs are shown side by side.

folders.py    reads what runs left in their folders
figures.py    numbers that remember where they were read
verdict.py    says in words how a run ended
tables.py     policies side by side
panels.py     which curves share a panel, and which alarms it shows
samples.py    which samples are shown, and in which words they differ
lineage.py    where inputs came from
settings.py   settings that differ from the preset, or between runs
charts.py     draws curves, intervals and points as SVG
page.py       puts the page together and writes it
"""
