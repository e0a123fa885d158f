import Foundation

/// Numbers in several extents. Its rows never follow each other closely here, and what was not written
/// holds no numbers, as Apple promises neither.
public class MLMultiArray {
    /// The kind of its numbers.
    public let dataType: MLMultiArrayDataType
    /// Its extents.
    public let shape: [NSNumber]
    /// How many numbers there are.
    public var count: Int { extents.reduce(1, *) }
    /// Numbers from one index to the next, for each extent.
    public var strides: [NSNumber] { steps.map { NSNumber(value: $0) } }

    let extents: [Int]
    let steps: [Int]
    private(set) var bytes: UnsafeMutableRawBufferPointer
    // Kept until the next move, so that the memory is not given out again at once.
    private var retired: UnsafeMutableRawBufferPointer?

    /// Numbers that pad each row.
    private static let padding = 3

    /// An array whose numbers are not written yet.
    public convenience init(shape: [NSNumber], dataType: MLMultiArrayDataType) throws {
        let extents = shape.map(\.intValue)
        guard !extents.isEmpty, !extents.contains(where: { $0 < 1 }) else {
            throw failure(4, "an array has no extent below 1")
        }
        // All ones: no number in half precision, and an id that no model has.
        self.init(extents, dataType, filledWith: 0xFF)
    }

    init(_ extents: [Int], _ dataType: MLMultiArrayDataType, filledWith byte: UInt8) {
        self.extents = extents
        self.dataType = dataType
        shape = extents.map { NSNumber(value: $0) }
        var steps = [1]
        var step = (extents.last ?? 1) + MLMultiArray.padding
        for extent in extents.dropFirst().dropLast().reversed() {
            steps.insert(step, at: 0)
            step *= extent
        }
        if extents.count > 1 { steps.insert(step, at: 0) }
        self.steps = steps
        let rows = extents.count > 1 ? extents[0] : 1
        bytes = .allocate(byteCount: rows * step * dataType.size, alignment: 64)
        bytes.initializeMemory(as: UInt8.self, repeating: byte)
    }

    deinit {
        bytes.deallocate()
        retired?.deallocate()
    }

    /// Gives access to the numbers.
    ///
    /// - Parameter body: gets the memory and the strides, counted in numbers.
    public func withUnsafeMutableBytes<R>(
        _ body: (UnsafeMutableRawBufferPointer, [Int]) throws -> R
    ) rethrows -> R {
        try body(bytes, steps)
    }

    /// Moves the numbers to other memory.
    func move() {
        let new = UnsafeMutableRawBufferPointer.allocate(byteCount: bytes.count, alignment: 64)
        new.copyMemory(from: UnsafeRawBufferPointer(bytes))
        // What still points to the old place finds no numbers there.
        bytes.initializeMemory(as: UInt8.self, repeating: 0xFF)
        retired?.deallocate()
        retired = bytes
        bytes = new
    }

    /// Where a row of the last extent begins, in bytes.
    func place(_ index: [Int]) -> Int {
        zip(index, steps).reduce(0) { $0 + $1.0 * $1.1 } * dataType.size
    }

    /// The numbers of a whole-number array, row after row.
    func integers() -> [Int32] {
        rows().flatMap { row in
            (0..<(extents.last ?? 0)).map {
                bytes.load(fromByteOffset: row + $0 * 4, as: Int32.self)
            }
        }
    }

    /// Half-precision numbers by their bits, row after row.
    func halves() -> [UInt16] {
        let width = extents.last ?? 0
        var all: [UInt16] = []
        all.reserveCapacity(count)
        for row in rows() {
            let part = UnsafeRawBufferPointer(rebasing: bytes[row..<row + 2 * width])
            all.append(contentsOf: part.bindMemory(to: UInt16.self))
        }
        return all
    }

    /// Whether its memory holds some bytes.
    func holds(_ other: [UInt8]) -> Bool {
        guard other.count == bytes.count, let own = bytes.baseAddress else { return false }
        return other.withUnsafeBytes { $0.baseAddress.map { memcmp($0, own, bytes.count) } == 0 }
    }

    /// Where all rows begin, in bytes.
    func rows() -> [Int] {
        var places = [0]
        for (extent, step) in zip(extents, steps).dropLast() {
            places = places.flatMap { place in
                (0..<extent).map { place + $0 * step * dataType.size }
            }
        }
        return places
    }
}
