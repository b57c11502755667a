"""What a run did to the model: conflict, stationarity, neurons, separability, interference."""
