"""One document model and its output formats: terminal, Markdown, LaTeX, HTML, SVG and PNG, independent of any experiment."""
