"""Things that are killed while work goes on, and the proof that nothing was lost or doubled."""
