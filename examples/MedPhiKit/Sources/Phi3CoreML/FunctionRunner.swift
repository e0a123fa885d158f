#if canImport(CoreML)
    import Foundation
    import Phi3Core

    #if os(Linux)
        import CoreML
    #else
        @preconcurrency import CoreML
    #endif

    /// One loaded function with its input arrays, which are made once and changed where a call differs
    /// from the one before.
    final class FunctionRunner {
        /// Its name in the package.
        let name: String
        /// Ids it reads.
        let width: Int
        let model: MLModel

        private let shape: PackageShape
        private let ids: MLMultiArray
        private let position: MLMultiArray
        private let mask: MLMultiArray
        private let lastIndex: MLMultiArray
        private let ropeRow: MLMultiArray?
        // What each row of the mask shows.
        private var shown: [Range<Int>]

        /// Makes the arrays of a function whose form was checked.
        init(_ name: String, _ model: MLModel, width: Int, shape: PackageShape) throws {
            func array(_ extents: [Int], _ type: MLMultiArrayDataType) throws -> MLMultiArray {
                try MLMultiArray(shape: extents.map { NSNumber(value: $0) }, dataType: type)
            }
            self.name = name
            self.model = model
            self.width = width
            self.shape = shape
            ids = try array([1, width], .int32)
            position = try array([1], .int32)
            mask = try array([1, 1, width, shape.context], .float16)
            lastIndex = try array([1], .int32)
            ropeRow = shape.switchLength == nil ? nil : try array([1], .int32)
            shown = Array(repeating: 0..<0, count: width)
            let hidden = [UInt16](repeating: shape.hidden, count: width * shape.context)
            if !StridedNumbers.write(
                hidden, shape: [1, 1, width, shape.context], to: mask)
            {
                throw FunctionRunner.failed(name, "its mask has no room for its numbers")
            }
        }

        /// Reads ids and gives the logits after the last of them.
        ///
        /// - Parameters:
        ///   - block: at most `width` ids.
        ///   - begin: the slot of the first one.
        ///   - usesLongFactors: which set of rotary tables turns them.
        ///   - slots: adapter slots that are inputs.
        ///   - state: gets their keys and values.
        func read(
            _ block: ArraySlice<Int32>, at begin: Int, usesLongFactors: Bool,
            slots: [String: MLMultiArray], state: MLState
        ) throws -> MLMultiArray {
            let padding = [Int32](repeating: 0, count: width - block.count)
            var isWritten = StridedNumbers.write(Array(block) + padding, to: ids)
            isWritten = StridedNumbers.write([Int32(begin)], to: position) && isWritten
            isWritten = StridedNumbers.write([Int32(block.count - 1)], to: lastIndex) && isWritten
            if let ropeRow {
                let row = BlockPlan.ropeRow(
                    position: begin, context: shape.context, usesLongFactors: usesLongFactors)
                isWritten = StridedNumbers.write([Int32(row)], to: ropeRow) && isWritten
            }
            guard isWritten, show(from: begin) else {
                throw FunctionRunner.failed(name, "its inputs have no room for their numbers")
            }
            let output = try model.prediction(
                from: try features(slots), using: state, options: MLPredictionOptions())
            guard let logits = output.featureValue(for: Feature.logits)?.multiArrayValue else {
                throw FunctionRunner.failed(name, "it gave no logits")
            }
            return logits
        }

        private func features(_ slots: [String: MLMultiArray]) throws -> MLDictionaryFeatureProvider
        {
            var arrays = slots
            arrays[Feature.ids] = ids
            arrays[Feature.position] = position
            arrays[Feature.mask] = mask
            arrays[Feature.lastIndex] = lastIndex
            arrays[Feature.ropeRow] = ropeRow
            return try MLDictionaryFeatureProvider(
                dictionary: arrays.mapValues { MLFeatureValue(multiArray: $0) })
        }

        /// Lets each row of the mask show what its query sees; false where there is no room.
        private func show(from begin: Int) -> Bool {
            let hidden = shape.hidden
            let window = shape.window
            let context = shape.context
            return mask.withUnsafeMutableBytes { bytes, strides in
                guard strides.count == 4, let cells = bytes.baseAddress,
                    ((width - 1) * strides[2] + (context - 1) * strides[3] + 1) * 2 <= bytes.count
                else { return false }
                for row in 0..<width {
                    let visible = MaskPlan.visible(query: begin + row, window: window)
                        .clamped(to: 0..<context)
                    let changes = MaskPlan.changes(from: shown[row], to: visible)
                    for (ranges, bits) in [(changes.shown, UInt16(0)), (changes.hidden, hidden)] {
                        for column in ranges.joined() {
                            cells.storeBytes(
                                of: bits,
                                toByteOffset: 2 * (row * strides[2] + column * strides[3]),
                                as: UInt16.self)
                        }
                    }
                    shown[row] = visible
                }
                return true
            }
        }

        static func failed(_ name: String, _ found: String) -> Phi3Error {
            .modelLoad(
                ErrorDetails(
                    place: "function \(name)", found: found,
                    expected: "a function as the manifest describes it",
                    advice: "Export the bundle again, or load it on other units."))
        }
    }
#endif
