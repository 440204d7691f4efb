import os

os.environ.setdefault("MPLBACKEND", "Agg")
for name in [k for k in os.environ if k.startswith("SSL_NB_")]: del os.environ[name]  # the developer's own settings stay out
