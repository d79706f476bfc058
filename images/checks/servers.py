"""In a container: MLflow with logins, migrated first, and the promoter beside it, as the chart starts them; both must answer."""

import os
import secrets
import subprocess
import sys
import time
import urllib.request

os.environ |= {
    "MLFLOW_BACKEND_STORE_URI": "sqlite:////var/lib/mlflow/runs.db",
    "MLFLOW_AUTH_DATABASE_URI": "sqlite:////var/lib/mlflow/users.db",
    "MLFLOW_ARTIFACTS_DESTINATION": "/var/lib/mlflow/artifacts",
    "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
    "MLFLOW_AUTH_ADMIN_PASSWORD": secrets.token_urlsafe(18),
    "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_urlsafe(18),
    "MLFLOW_SERVER_ALLOWED_HOSTS": "127.0.0.1:5000",
    "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000",
}
os.environ["MLFLOW_TRACKING_USERNAME"] = os.environ["MLFLOW_AUTH_ADMIN_USERNAME"]
os.environ["MLFLOW_TRACKING_PASSWORD"] = os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"]
PATIENCE = 180  # seconds


def answers(url: str, process: subprocess.Popen) -> None:
    """Wait until the server says 200; end when it dies or takes too long."""
    began, said = time.monotonic(), ""
    while time.monotonic() - began < PATIENCE:
        if process.poll() is not None:
            sys.exit(f"{process.args} ended with {process.returncode} before {url} answered")
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                if reply.status == 200:
                    print(f"{url} answers after {time.monotonic() - began:.0f} s")
                    return
        except OSError as error:
            said = str(error)
        time.sleep(0.5)
    sys.exit(f"{url} did not answer within {PATIENCE} s: {said}")


server = [sys.executable, "-m", "services.mlflow_server"]
subprocess.run([*server, "migrate"], check=True)
mlflow = subprocess.Popen([*server, "serve"])
answers("http://127.0.0.1:5000/health", mlflow)
promoter = subprocess.Popen([sys.executable, "-m", "services.promoter", "--model", "points", "--period", "2"])
answers("http://127.0.0.1:8080/healthz", promoter)
answers("http://127.0.0.1:8080/readyz", promoter)  # a whole round against that registry
for process in (promoter, mlflow):
    process.terminate()
    process.wait(30)
