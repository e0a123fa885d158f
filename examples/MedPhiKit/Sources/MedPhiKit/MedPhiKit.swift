@_exported import Phi3Core
