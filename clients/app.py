"""The Flower ClientApp: answers who it is, and trains or evaluates when asked.

Thin on purpose: training, encoding and checks come from the installed `federated` library, which the device's owner
chose and pinned, not from this file, which the server can replace.
"""

from flwr.clientapp import ClientApp

from federated.flower import handle_query, handle_train

app = ClientApp()
app.query()(handle_query)
app.train()(handle_train)
