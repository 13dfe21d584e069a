"""`make docs`: every generated block and picture of the documents, and the rules as JSON."""

from __future__ import annotations

from benchmarks.report import documents, pictures, rules

if __name__ == "__main__":
    for document in documents.DOCUMENTS:
        documents.fill(document)
    pictures.draw()
    rules.write()
