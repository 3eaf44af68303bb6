"""`sdft report`."""

from __future__ import annotations

from pathlib import Path

from sdft.early_checks import check_output_file
from sdft.report.page import default_file, page
from sdft.report.run_folder import check_run
from sdft.run_files import READ_BY_REPORT
from sdft.settings.commands import ReportCommand


def report(command: ReportCommand) -> None:
    """`sdft report`: write the page of one run or of several. It takes neither torch nor transformers."""
    folders = [Path(folder) for folder in command.run_dir or ()]
    for folder in folders:
        check_run(folder)
    output = command.output_file or str(default_file(folders))
    check_output_file(
        "output_file", output, inputs=[str(folder / name) for folder in folders for name in READ_BY_REPORT]
    )
    text = page(folders)
    Path(output).write_text(text, encoding="utf-8")
    print(f"{output} shows {', '.join(map(str, folders))} ({len(text.encode()) / 2**20:.1f} MiB)")
