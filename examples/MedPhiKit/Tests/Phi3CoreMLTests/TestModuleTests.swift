#if os(Linux)
    import CoreML
    import Foundation
    import Phi3Core
    import Testing

    @testable import Phi3CoreML

    /// The test module refuses what a wrong loop would do; otherwise its silence proves nothing.
    @Suite struct TestModuleTests {
        /// One function of a bundle with its inputs, right for a first block of 16.
        private final class Caller {
            let rig: Rig
            let model: MLModel
            let state: MLState
            let compiled: URL
            let width: Int
            var arrays: [String: MLMultiArray] = [:]

            init(
                _ maker: BundleMaker = BundleMaker(context: 32, width: 16),
                function: String = "prefill"
            ) async throws {
                rig = try Rig(maker)
                let configuration = MLModelConfiguration()
                configuration.functionName = function
                compiled = try await MLModel.compileModel(at: rig.bundle.package)
                model = try MLModel(contentsOf: compiled, configuration: configuration)
                state = model.makeState()
                let inputs = model.modelDescription.inputDescriptionsByName
                width = try #require(
                    inputs["inputIds"]?.multiArrayConstraint?.shape.last?.intValue)
                for (name, input) in inputs {
                    let form = try #require(input.multiArrayConstraint)
                    arrays[name] = try MLMultiArray(shape: form.shape, dataType: form.dataType)
                }
                write("inputIds", Fixtures.ids(width))
                place(0, last: width - 1)
            }

            deinit { try? FileManager.default.removeItem(at: compiled) }

            func write(_ name: String, _ numbers: [Int32]) {
                if let array = arrays[name] { _ = StridedNumbers.write(numbers, to: array) }
            }

            func place(_ position: Int, last: Int, window: Int? = nil) {
                write("position", [Int32(position)])
                write("lastIndex", [Int32(last)])
                write("ropeRow", [Int32(position)])
                guard let mask = arrays["causalMask"] else { return }
                let context = mask.shape[3].intValue
                let bits = (0..<width).flatMap { row in
                    (0..<context).map {
                        MaskPlan.visible(query: position + row, window: window).contains($0)
                            ? UInt16(0) : HalfFloat.bits(of: -10000)
                    }
                }
                _ = StridedNumbers.write(bits, shape: [1, 1, width, context], to: mask)
            }

            /// The error of a call; `nil`: it works.
            func call(_ state: MLState? = nil) -> String? {
                do {
                    let values = arrays.mapValues { MLFeatureValue(multiArray: $0) }
                    _ = try model.prediction(
                        from: try MLDictionaryFeatureProvider(dictionary: values),
                        using: state ?? self.state, options: MLPredictionOptions())
                    return nil
                } catch {
                    return (error as NSError).localizedDescription
                }
            }
        }

        @Test func aRightCallIsComputed() async throws {
            let caller = try await Caller()
            #expect(caller.call() == nil)
            caller.place(16, last: 15)
            #expect(caller.call() == nil)
        }

        @Test func namesAndFormsAreChecked() async throws {
            let caller = try await Caller()
            let ids = caller.arrays["inputIds"]
            caller.arrays["inputIds"] = nil
            #expect(caller.call()?.contains("inputIds is missing") == true)
            caller.arrays["inputIds"] = try MLMultiArray(shape: [1, 8], dataType: .int32)
            #expect(caller.call()?.contains("inputIds is of another form") == true)
            caller.arrays["inputIds"] = try MLMultiArray(shape: [1, 16], dataType: .float16)
            #expect(caller.call()?.contains("inputIds is of another form") == true)
            caller.arrays["inputIds"] = ids
            caller.arrays["ropeRow"] = try MLMultiArray(shape: [1], dataType: .int32)
            #expect(caller.call()?.contains("ropeRow is missing, or is no input") == true)
        }

        @Test func numbersAreChecked() async throws {
            let caller = try await Caller()
            caller.write("inputIds", Array(repeating: 320, count: 16))
            #expect(caller.call()?.contains("not in the vocabulary") == true)
            caller.write("inputIds", Fixtures.ids(16))
            caller.place(17, last: 15)
            #expect(caller.call()?.contains("leaves the cache") == true)
            caller.place(0, last: 16)
            #expect(caller.call()?.contains("outside the block") == true)
            caller.place(0, last: 15, window: 3)
            #expect(caller.call()?.contains("the mask is wrong at row 3, column 0") == true)
            caller.place(1, last: 15)
            caller.write("position", [0])
            #expect(caller.call()?.contains("the mask is wrong at row 0, column 1") == true)
        }

        @Test func arraysThatNobodyWroteHoldNoNumbers() async throws {
            let caller = try await Caller()
            caller.arrays["causalMask"] = try MLMultiArray(
                shape: [1, 1, 16, 32], dataType: .float16)
            #expect(caller.call()?.contains("the mask is wrong") == true)
        }

        @Test func keysThatNobodyWroteAreNotSeen() async throws {
            let caller = try await Caller()
            caller.place(8, last: 15)
            #expect(caller.call()?.contains("slot 0 holds") == true)
            // What only fills a block up is nobody's either.
            caller.place(0, last: 4)
            #expect(caller.call() == nil)
            caller.place(5, last: 3)
            #expect(caller.call() == nil)
            caller.place(16, last: 3)
            #expect(caller.call()?.contains("slot 9 holds") == true)
        }

        @Test func keysOfAnotherAdapterAreNotSeen() async throws {
            let caller = try await Caller(
                BundleMaker(context: 32, width: 16, adapters: .slots(.state)))
            #expect(caller.call() == nil)
            caller.state.withMultiArray(for: "loraB_o") { array in
                array.withUnsafeMutableBytes { bytes, _ in
                    bytes.storeBytes(of: 0x3C00, as: UInt16.self)
                }
            }
            caller.place(16, last: 3)
            #expect(caller.call()?.contains("slot 0 holds") == true)
        }

        @Test func rotaryRowsAreChecked() async throws {
            let checkpoint = Fixtures.phi3.appendingPathComponent("longrope-long")
            let caller = try await Caller(
                BundleMaker(checkpoint: checkpoint, context: 64, width: 16))
            caller.write("ropeRow", [1])
            #expect(caller.call()?.contains("ropeRow 1 does not go") == true)
            for position in [0, 16] {
                caller.place(position, last: 15)
                #expect(caller.call() == nil)
            }
            caller.place(32, last: 0)
            #expect(caller.call()?.contains("33 tokens are turned with the short") == true)
            caller.write("ropeRow", [96])
            #expect(caller.call()?.contains("slot 0 holds") == true)
        }

        @Test func oneStateTakesOnePredictionAtATime() async throws {
            let caller = try await Caller()
            nonisolated(unsafe) let inner = caller
            nonisolated(unsafe) var second: String?
            caller.rig.bench.faults.onPrediction = { _ in
                inner.rig.bench.faults.onPrediction = nil
                second = inner.call()
                inner.state.withMultiArray(for: "keyCache") { _ in }
            }
            #expect(caller.call() == nil)
            #expect(second?.contains("two predictions at once") == true)
            #expect(caller.rig.bench.notes.count == 2)
        }

        @Test func statesBelongToTheirPackage() async throws {
            let caller = try await Caller()
            let other = try await Caller()
            #expect(caller.call(other.state)?.contains("another package's") == true)
            let decode = MLModelConfiguration()
            decode.functionName = "nothing"
            #expect(throws: NSError.self) {
                try MLModel(contentsOf: caller.rig.bundle.package, configuration: decode)
            }
            #expect(throws: NSError.self) {
                try MLModel(contentsOf: caller.compiled, configuration: decode)
            }
        }

        @Test func memoryIsPaddedAndMoves() async throws {
            let caller = try await Caller()
            var places: Set<UnsafeMutableRawPointer?> = []
            for _ in 0..<3 {
                caller.state.withMultiArray(for: "keyCache") { array in
                    array.withUnsafeMutableBytes { bytes, strides in
                        places.insert(bytes.baseAddress)
                        #expect(strides[2] > array.shape[3].intValue)
                        #expect(bytes.load(as: UInt16.self) == 0)
                    }
                }
            }
            #expect(places.count > 1)
        }
    }
#endif
