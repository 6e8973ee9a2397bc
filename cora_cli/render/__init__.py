"""One document model and its outputs: terminal, Markdown, LaTeX, HTML, SVG and PNG. It knows no experiment."""
