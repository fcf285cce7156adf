"""The server on Ray Serve: many machines behind one address. `ray_app.py` puts the parts together."""
