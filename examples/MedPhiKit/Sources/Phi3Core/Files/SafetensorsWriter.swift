import Foundation

/// One tensor of a file to be written, and where its bytes come from when their turn comes.
public struct TensorPiece {
    /// Its name.
    public var name: String
    /// The kind of its numbers.
    public var type: TensorType
    /// Its extents.
    public var shape: [Int]
    /// Gives its bytes in one piece or several, in order.
    public var chunks: (_ write: (Data) throws -> Void) throws -> Void

    /// A piece whose bytes are made while it is written.
    public init(
        name: String, type: TensorType, shape: [Int],
        chunks: @escaping (_ write: (Data) throws -> Void) throws -> Void
    ) {
        self.name = name
        self.type = type
        self.shape = shape
        self.chunks = chunks
    }

    /// A tensor that is in memory or mapped already.
    public init(name: String, _ tensor: Tensor) {
        self.init(name: name, type: tensor.type, shape: tensor.shape) { try $0(tensor.data) }
    }

    /// Its size in bytes.
    var byteCount: Int { shape.reduce(type.size, *) }
}

/// Writes safetensors files, header first, then tensor by tensor.
public enum SafetensorsWriter {
    /// Writes a file that appears complete or not at all.
    ///
    /// - Parameters:
    ///   - url: the file.
    ///   - pieces: its tensors, in the order they will have.
    ///   - metadata: text facts, in order.
    ///   - replace: whether an existing file is replaced.
    /// - Throws: `Phi3Error.notWritten`, or `CancellationError` where its task is cancelled; what was
    ///   there is unchanged.
    public static func write(
        to url: URL, pieces: [TensorPiece], metadata: [(name: String, text: String)],
        replace: Bool = false
    ) throws {
        try AtomicFile.write(to: url, replace: replace) { writer in
            try writer.write(header(pieces, metadata))
            for piece in pieces {
                var written = 0
                try piece.chunks { data in
                    written += data.count
                    try write(data, writer)
                }
                if written != piece.byteCount {
                    throw Phi3Error.notWritten(
                        path: url.path,
                        reason:
                            "\(piece.name) is \(written) bytes, its shape needs \(piece.byteCount)")
                }
            }
        }
    }

    /// Writes bytes, which may be gigabytes, and looks between pieces whether the task is cancelled.
    private static func write(_ data: Data, _ writer: FileWriter) throws {
        try data.withUnsafeBytes { bytes in
            for start in stride(from: 0, to: bytes.count, by: pieceBytes) {
                try Task.checkCancellation()
                let end = min(start + pieceBytes, bytes.count)
                try writer.write(UnsafeRawBufferPointer(rebasing: bytes[start..<end]))
            }
        }
    }

    private static let pieceBytes = 4 << 20

    /// A header for tensors in this order, its length included, padded so that their bytes begin on
    /// an eight-byte border.
    static func header(
        _ pieces: [TensorPiece], _ metadata: [(name: String, text: String)]
    ) -> Data {
        var members = JSONObject()
        if !metadata.isEmpty {
            let facts = metadata.map { (name: $0.name, value: JSONValue.string($0.text)) }
            members["__metadata__"] = .object(JSONObject(facts))
        }
        var begin = 0
        for piece in pieces {
            let end = begin + piece.byteCount
            members[piece.name] = [
                "dtype": .string(piece.type.rawValue),
                "shape": .array(piece.shape.map { .integer($0) }),
                "data_offsets": .array([.integer(begin), .integer(end)]),
            ]
            begin = end
        }
        var text = Data(JSONValue.object(members).text(.compact).utf8)
        text.append(contentsOf: [UInt8](repeating: 0x20, count: (8 - text.count % 8) % 8))
        var length = UInt64(text.count).littleEndian
        return withUnsafeBytes(of: &length) { Data($0) } + text
    }
}

extension JSONValue: ExpressibleByDictionaryLiteral {
    /// An object from a literal; of equal names the last counts.
    public init(dictionaryLiteral elements: (String, JSONValue)...) {
        self = .object(JSONObject(elements.map { (name: $0.0, value: $0.1) }))
    }
}
