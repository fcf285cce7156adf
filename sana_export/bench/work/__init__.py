"""Operations and bytes of an image, and the least time that a machine needs for them."""
