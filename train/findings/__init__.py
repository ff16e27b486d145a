"""`train findings`: a second network that looks for findings on radiographs, measured by grouped cross-validation before it may answer."""
