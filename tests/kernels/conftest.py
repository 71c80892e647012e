from cuda_emulator import emulator as emulator  # one for all modules: its operators can be defined once
