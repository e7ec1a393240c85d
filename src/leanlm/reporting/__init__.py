"""What people look at: pictures, the summary of a run, the comparison of several."""
