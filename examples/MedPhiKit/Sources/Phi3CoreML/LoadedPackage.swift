#if canImport(CoreML)
    import Foundation
    import Phi3Core

    #if os(Linux)
        import CoreML
    #else
        @preconcurrency import CoreML
    #endif

    /// The functions of a compiled package that are in memory: one pair, since each function that is
    /// loaded is a model of its own to Core ML.
    final class LoadedPackage {
        /// The compiled package.
        let url: URL
        /// The units it was loaded on.
        let units: Manifest.CoreMLFacts.Units
        /// The functions that are loaded; `nil` after a failed change of them.
        private(set) var pair: Pair?

        /// Two functions and their names.
        struct Pair {
            let names: PackageShape.Pair
            let prefill: FunctionRunner
            let decode: FunctionRunner
        }

        private let shape: PackageShape

        /// Loads the functions of the base on the first of some units that takes them.
        ///
        /// - Throws: `Phi3Error`: no units take it, or it is not what the manifest says.
        init(
            _ url: URL, shape: PackageShape, units: [Manifest.CoreMLFacts.Units]
        ) throws {
            var refused: [String] = []
            for choice in units {
                do {
                    let pair = try LoadedPackage.load(url, shape.base, shape, choice)
                    self.url = url
                    self.shape = shape
                    self.units = choice
                    self.pair = pair
                    return
                } catch let error as Phi3Error {
                    throw error  // The same on all units.
                } catch {
                    refused.append("\(choice.rawValue): \(LoadedPackage.reason(error))")
                }
            }
            throw Phi3Error.modelLoad(
                ErrorDetails(
                    place: url.path,
                    found: "Core ML does not load it (\(refused.joined(separator: "; ")))",
                    expected: "a package that this system and its units can run",
                    advice: "Free memory or update the system; else export the bundle again."))
        }

        /// Loads other functions in place of those that are loaded.
        func change(to names: PackageShape.Pair) throws {
            if pair?.names == names { return }
            // The old ones go first: both together may be more than the memory holds.
            pair = nil
            do {
                pair = try LoadedPackage.load(url, names, shape, units)
            } catch let error as Phi3Error {
                throw error
            } catch {
                throw FunctionRunner.failed(
                    names.prefill, "Core ML does not load it (\(LoadedPackage.reason(error)))")
            }
        }

        private static func load(
            _ url: URL, _ names: PackageShape.Pair, _ shape: PackageShape,
            _ units: Manifest.CoreMLFacts.Units
        ) throws -> Pair {
            let prefill = try model(url, names.prefill, units)
            let decode = try model(url, names.decode, units)
            var lines: [String] = []
            for (name, model) in [(names.prefill, prefill), (names.decode, decode)] {
                guard let signature = shape.manifest.medphi.coreml.functions[name] else {
                    lines.append("function '\(name)' is not in the manifest")
                    continue
                }
                lines += SchemaCheck.differences(model.modelDescription, name, signature)
            }
            if !lines.isEmpty { throw mismatch(url, lines) }
            return Pair(
                names: names,
                prefill: try FunctionRunner(
                    names.prefill, prefill, width: shape.width, shape: shape),
                decode: try FunctionRunner(names.decode, decode, width: 1, shape: shape))
        }

        private static func model(
            _ url: URL, _ function: String, _ units: Manifest.CoreMLFacts.Units
        ) throws -> MLModel {
            let configuration = MLModelConfiguration()
            configuration.functionName = function
            configuration.computeUnits = units.computeUnits
            return try MLModel(contentsOf: url, configuration: configuration)
        }

        static func mismatch(_ url: URL, _ lines: [String]) -> Phi3Error {
            PackageContract.mismatch(url.path, lines)
        }

        /// What Core ML says of an error; it knows nothing of what was read or written.
        static func reason(_ error: any Error) -> String {
            let error = error as NSError
            let text = error.localizedDescription.prefix(200)
            let plain = text.unicodeScalars.map { $0.value < 32 ? " " : String($0) }.joined()
            return "\(error.domain) \(error.code), \(plain)"
        }
    }

    extension Manifest.CoreMLFacts.Units {
        /// Core ML's name for them.
        var computeUnits: MLComputeUnits {
            switch self {
            case .cpuAndGPU: return .cpuAndGPU
            case .cpuAndNeuralEngine: return .cpuAndNeuralEngine
            case .cpuOnly: return .cpuOnly
            case .all: return .all
            }
        }
    }
#endif
