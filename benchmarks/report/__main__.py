"""`make docs`: every generated block and picture of the documents, from what is committed."""

from __future__ import annotations

from benchmarks.report import documents, pictures

if __name__ == "__main__":
    for document in documents.DOCUMENTS:
        documents.fill(document)
    pictures.draw()
