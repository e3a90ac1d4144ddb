"""One module for each lab of the book, and what the labs share."""
