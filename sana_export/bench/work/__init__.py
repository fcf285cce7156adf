"""Operations and bytes of an image, and the time that a machine needs for them at least."""
