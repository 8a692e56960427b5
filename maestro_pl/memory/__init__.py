"""How much memory a run needs: estimated before it, measured at its beginning, and what happens when it runs out."""
