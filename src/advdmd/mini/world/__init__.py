"""The miniature world: captioned scenes of coloured shapes, their renderer and an exact checker (numpy only)."""
