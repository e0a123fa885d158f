#if canImport(CoreML)
    import CoreML
    import Phi3Core

    /// Numbers in and out of Core ML's arrays, whose rows need not follow each other closely and
    /// whose memory may be another at each access.
    enum StridedNumbers {
        /// Writes half-precision numbers, the last extent fastest.
        ///
        /// - Parameters:
        ///   - bits: as many as the shape says.
        ///   - array: of that shape.
        /// - Returns: false where the array has no room for them; nothing was written then.
        static func write(_ bits: [UInt16], shape: [Int], to array: MLMultiArray) -> Bool {
            guard array.dataType == .float16, array.shape.map(\.intValue) == shape,
                bits.count == shape.reduce(1, *)
            else { return false }
            return array.withUnsafeMutableBytes { bytes, strides in
                guard let target = bytes.baseAddress, let width = shape.last,
                    room(shape, strides) * 2 <= bytes.count
                else { return false }
                let step = strides.last ?? 1
                bits.withUnsafeBytes { source in
                    guard let source = source.baseAddress else { return }
                    for row in 0..<(width > 0 ? bits.count / width : 0) {
                        let place = target + 2 * offset(row, shape, strides)
                        let from = source + 2 * row * width
                        if step == 1 {
                            place.copyMemory(from: from, byteCount: 2 * width)
                            continue
                        }
                        for column in 0..<width {
                            (place + 2 * column * step).copyMemory(
                                from: from + 2 * column, byteCount: 2)
                        }
                    }
                }
                return true
            }
        }

        /// Sets the numbers of a one-dimensional array, or of one row after some ones of extent 1.
        static func write(_ numbers: [Int32], to array: MLMultiArray) -> Bool {
            guard array.dataType == .int32, array.count == numbers.count,
                array.shape.last?.intValue == numbers.count
            else { return false }
            return array.withUnsafeMutableBytes { bytes, strides in
                let step = strides.last ?? 1
                guard let target = bytes.baseAddress, let last = numbers.indices.last,
                    (last * step + 1) * 4 <= bytes.count
                else { return false }
                for (index, number) in numbers.enumerated() {
                    target.storeBytes(of: number, toByteOffset: index * step * 4, as: Int32.self)
                }
                return true
            }
        }

        /// One row of half-precision numbers in single precision; `nil` where the array is another.
        static func row(of array: MLMultiArray, count: Int) -> [Float]? {
            guard array.dataType == .float16, array.count == count,
                array.shape.last?.intValue == count
            else { return nil }
            return array.withUnsafeMutableBytes { bytes, strides -> [Float]? in
                let step = strides.last ?? 1
                guard let source = bytes.baseAddress,
                    count == 0 || ((count - 1) * step + 1) * 2 <= bytes.count
                else { return nil }
                return [Float](unsafeUninitializedCapacity: count) { room, filled in
                    for index in 0..<count {
                        let bits = source.loadUnaligned(
                            fromByteOffset: index * step * 2, as: UInt16.self)
                        room[index] = HalfFloat.value(of: bits)
                    }
                    filled = count
                }
            }
        }

        /// Numbers from the first to behind the last one.
        private static func room(_ shape: [Int], _ strides: [Int]) -> Int {
            guard shape.count == strides.count, !shape.contains(0) else { return 0 }
            return zip(shape, strides).reduce(1) { $0 + ($1.0 - 1) * $1.1 }
        }

        /// Where a row begins, rows counted as if they were stored closely.
        private static func offset(_ row: Int, _ shape: [Int], _ strides: [Int]) -> Int {
            var rest = row
            var offset = 0
            for axis in shape.indices.dropLast().reversed() {
                offset += rest % shape[axis] * strides[axis]
                rest /= shape[axis]
            }
            return offset
        }
    }
#endif
