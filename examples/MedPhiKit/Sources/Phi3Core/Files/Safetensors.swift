import Foundation

/// The kinds of numbers that a safetensors file may hold, by their names there.
public enum TensorType: String, Sendable, CaseIterable {
    /// True or false, one byte.
    case bool = "BOOL"
    /// Whole numbers without sign.
    case u8 = "U8"
    case u16 = "U16"
    case u32 = "U32"
    case u64 = "U64"
    /// Whole numbers with sign.
    case i8 = "I8"
    case i16 = "I16"
    case i32 = "I32"
    case i64 = "I64"
    /// Eight-bit floating-point numbers.
    case f8e4m3 = "F8_E4M3"
    case f8e5m2 = "F8_E5M2"
    /// Half precision.
    case f16 = "F16"
    /// The upper half of a single-precision number.
    case bf16 = "BF16"
    /// Single precision.
    case f32 = "F32"
    /// Double precision.
    case f64 = "F64"

    /// Bytes of one number.
    public var size: Int {
        switch self {
        case .bool, .u8, .i8, .f8e4m3, .f8e5m2: return 1
        case .u16, .i16, .f16, .bf16: return 2
        case .u32, .i32, .f32: return 4
        case .u64, .i64, .f64: return 8
        }
    }

    /// Whether weights and adapters may be stored so: F32, F16 or BF16.
    public var isWeight: Bool { self == .f32 || self == .f16 || self == .bf16 }
}

/// A tensor of a safetensors file: its kind, its shape, and its bytes' range after the header.
public struct TensorInfo: Sendable, Equatable {
    /// The kind of its numbers.
    public var type: TensorType
    /// Its extents; empty for a single number.
    public var shape: [Int]
    /// Where its bytes lie, counted from the end of the header.
    public var range: Range<Int>
}

/// The header of a safetensors file, read strictly; no tensor's bytes are touched.
public struct SafetensorsHeader: Sendable {
    /// Name of each tensor -> what the header says of it.
    public let tensors: [String: TensorInfo]
    /// Text facts about the file.
    public let metadata: [String: String]
    /// The offset of the first tensor byte.
    public let dataStart: Int

    /// The format's own limit.
    static let largest = 100_000_000

    /// Names in the order of their bytes in the file.
    public var namesByPlace: [String] {
        tensors.sorted {
            ($0.value.range.lowerBound, $0.value.range.upperBound, $0.key)
                < ($1.value.range.lowerBound, $1.value.range.upperBound, $1.key)
        }.map(\.key)
    }
}

/// A safetensors file: its header checked, its tensors mapped.
public struct SafetensorsFile: Sendable {
    /// The mapped file.
    public let file: MappedFile
    /// Its header.
    public let header: SafetensorsHeader

    /// Maps a file and checks its header.
    ///
    /// - Throws: `Phi3Error`: missing, cut or damaged, or tensors that overlap or leave holes.
    public init(_ url: URL) throws {
        file = try MappedFile(url)
        header = try SafetensorsHeader(file.data, path: url.path)
    }

    /// Where it lies.
    public var url: URL { file.url }

    /// A tensor with its bytes, still mapped; `nil` where the file has none of this name.
    public func tensor(_ name: String) -> Tensor? {
        guard let info = header.tensors[name] else { return nil }
        let begin = file.data.startIndex + header.dataStart
        let data = file.data[begin + info.range.lowerBound..<begin + info.range.upperBound]
        return Tensor(type: info.type, shape: info.shape, data: data)
    }
}

extension SafetensorsHeader {
    /// Reads the header at the front of a file's bytes.
    ///
    /// - Parameters:
    ///   - data: the whole file.
    ///   - path: its name, for messages.
    /// - Throws: `Phi3Error.damaged`.
    public init(_ data: Data, path: String) throws {
        func damaged(_ what: String) -> Phi3Error {
            .damaged(
                path: path, what: "not a whole safetensors file: \(what)",
                advice: "Fetch or write the file again.")
        }
        let length =
            data.count < 8
            ? UInt64.max
            : data.withUnsafeBytes {
                UInt64(littleEndian: $0.loadUnaligned(as: UInt64.self))
            }
        guard length <= UInt64(max(0, min(data.count - 8, SafetensorsHeader.largest))) else {
            throw damaged("it has \(data.count) bytes and no room for its header")
        }
        let start = 8 + Int(length)
        let text = data[data.startIndex + 8..<data.startIndex + start]
        let parsed: JSONValue
        do {
            parsed = try JSONValue(parsing: text)
        } catch {
            throw damaged("its header is not JSON (\(error))")
        }
        guard let members = parsed.object else { throw damaged("its header is not a JSON object") }
        do {
            try self.init(members, start: start, size: data.count)
        } catch let problem as HeaderProblem {
            throw damaged(problem.what)
        }
    }

    private struct HeaderProblem: Error {
        let what: String
    }

    private init(_ members: JSONObject, start: Int, size: Int) throws {
        var tensors: [String: TensorInfo] = [:]
        var metadata: [String: String] = [:]
        tensors.reserveCapacity(members.count)
        for (name, value) in members {
            if name == "__metadata__" {
                metadata = try SafetensorsHeader.metadata(value)
                continue
            }
            let info = try SafetensorsHeader.info(name, value)
            guard tensors.updateValue(info, forKey: name) == nil else {
                throw HeaderProblem(what: "tensor \(printable(name)) is there twice")
            }
        }
        self.tensors = tensors
        self.metadata = metadata
        dataStart = start
        var position = 0
        for name in namesByPlace {
            guard let range = tensors[name]?.range, range.lowerBound == position else {
                throw HeaderProblem(what: "tensor \(printable(name)) does not begin at \(position)")
            }
            position = range.upperBound
        }
        guard size - start == position else {
            throw HeaderProblem(
                what: "it has \(size) bytes, its header describes \(start)+\(position)")
        }
    }

    private static func metadata(_ value: JSONValue) throws -> [String: String] {
        if value.isNull { return [:] }  // MLX writes null where there is none
        guard let members = value.object else {
            throw HeaderProblem(what: "its metadata is not a map of text to text")
        }
        var found: [String: String] = [:]
        for (name, value) in members {
            guard let text = value.string, found.updateValue(text, forKey: name) == nil else {
                throw HeaderProblem(what: "its metadata is not a map of text to text")
            }
        }
        return found
    }

    private static func info(_ name: String, _ value: JSONValue) throws -> TensorInfo {
        let shape = value["shape"]?.array?.map(\.integer)
        let offsets = value["data_offsets"]?.array
        guard let text = value["dtype"]?.string, let type = TensorType(rawValue: text), let shape,
            let offsets, offsets.count == 2, let begin = offsets[0].integer,
            let end = offsets[1].integer, begin >= 0, begin <= end
        else { throw HeaderProblem(what: "the entry of tensor \(printable(name)) is malformed") }
        var extents: [Int] = []
        var bytes = type.size
        var overflows = false
        for extent in shape {
            guard let extent, extent >= 0 else {
                throw HeaderProblem(what: "the entry of tensor \(printable(name)) is malformed")
            }
            extents.append(extent)
            let product = bytes.multipliedReportingOverflow(by: extent)
            bytes = product.partialValue
            overflows = overflows || product.overflow
        }
        if overflows, !extents.contains(0) { bytes = -1 } else if extents.contains(0) { bytes = 0 }
        guard bytes == end - begin else {
            throw HeaderProblem(
                what: "tensor \(printable(name)) has \(end - begin) bytes, its shape needs others")
        }
        return TensorInfo(type: type, shape: extents, range: begin..<end)
    }
}
