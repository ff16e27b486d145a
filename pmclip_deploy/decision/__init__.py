"""From a question as it was understood, the file's header and the graphs' outputs to a reply. No graph runs here."""
