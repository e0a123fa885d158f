"""Text in, examples out: readers, splits, screening and the note prompt."""
