from genvm_manager import makeApplication

application = makeApplication()
