import Foundation
import Testing

@testable import Phi3Core

@Suite struct SafetensorsTests {
    private static func file(_ header: String, _ data: [UInt8] = []) -> Data {
        var length = UInt64(header.utf8.count).littleEndian
        return withUnsafeBytes(of: &length) { Data($0) } + Data(header.utf8) + Data(data)
    }

    private static let pair = #"{"dtype":"F16","shape":[2],"data_offsets":[0,4]}"#

    @Test func whatIsWrittenIsReadBack() throws {
        let folder = try TestFolder()
        let place = folder["x.safetensors"]
        let a = Tensor([1, -2.5, 0.25, 3, 4, 5], shape: [2, 3])
        let b = Tensor([1, 2], shape: [2], as: .bf16)
        try SafetensorsWriter.write(
            to: place, pieces: [TensorPiece(name: "a", a), TensorPiece(name: "b", b)],
            metadata: [(name: "format", text: "é\n")])
        let file = try SafetensorsFile(place)
        #expect(file.header.metadata == ["format": "é\n"])
        #expect(file.tensor("a")?.floats() == [1, -2.5, 0.25, 3, 4, 5])
        #expect(file.tensor("a")?.shape == [2, 3])
        #expect(file.tensor("b")?.floats() == [1, 2])
        #expect(file.tensor("c") == nil)
        #expect(file.header.namesByPlace == ["a", "b"])
        #expect(file.header.dataStart % 8 == 0)
    }

    @Test func headersOfTheFormatAreRead() throws {
        let empty = try SafetensorsHeader(Self.file("{}"), path: "x")
        #expect(empty.tensors.isEmpty)
        let null = try SafetensorsHeader(Self.file(#"{"__metadata__":null}  "#), path: "x")
        #expect(null.metadata.isEmpty)
        let zero = try SafetensorsHeader(
            Self.file(
                #"{"a":{"dtype":"F32","shape":[0,9223372036854775807],"data_offsets":[0,0]}}"#),
            path: "x")
        #expect(zero.tensors["a"]?.range == 0..<0)
    }

    @Test(arguments: [
        "", "[]", "{", "\u{FEFF}{}", #"{"a":1}"#, #"{"a":{}}"#, #"{"a":\#(pair),"a":\#(pair)}"#,
        #"{"__metadata__":{"a":1}}"#, #"{"__metadata__":[]}"#,
        #"{"a":{"dtype":"F17","shape":[2],"data_offsets":[0,4]}}"#,
        #"{"a":{"dtype":"F16","shape":[3],"data_offsets":[0,4]}}"#,
        #"{"a":{"dtype":"F16","shape":[2.0],"data_offsets":[0,4]}}"#,
        #"{"a":{"dtype":"F16","shape":[-2],"data_offsets":[0,4]}}"#,
        #"{"a":{"dtype":"F16","shape":[true,2],"data_offsets":[0,4]}}"#,
        #"{"a":{"dtype":"F16","shape":[4611686018427387904,4],"data_offsets":[0,4]}}"#,
        #"{"a":{"dtype":"F16","shape":[2],"data_offsets":[4,0]}}"#,
        #"{"a":{"dtype":"F16","shape":[2],"data_offsets":[-4,0]}}"#,
        #"{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4,8]}}"#,
        #"{"a":{"dtype":"F16","shape":[1],"data_offsets":[2,4]}}"#,
        #"{"a":\#(pair),"b":\#(pair)}"#, #"{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}"#,
    ])
    func damagedHeadersAreRefused(header: String) {
        #expect(throws: Phi3Error.self) {
            try SafetensorsHeader(Self.file(header, [0, 0, 0, 0]), path: "x")
        }
    }

    @Test func aWholeFileIsReadAndACutOneIsNot() throws {
        let whole = Self.file(#"{"a":\#(Self.pair)}"#, [0, 60, 0, 64])
        #expect(try SafetensorsHeader(whole, path: "x").tensors["a"]?.shape == [2])
        for count in 0..<whole.count {
            #expect(throws: Phi3Error.self) {
                try SafetensorsHeader(whole.prefix(count), path: "x")
            }
        }
        #expect(throws: Phi3Error.self) { try SafetensorsHeader(whole + [0], path: "x") }
        #expect(throws: Phi3Error.self) {
            try SafetensorsHeader(Data(repeating: 0xFF, count: 64), path: "x")
        }
    }

    @Test func aFailedWritingLeavesWhatWasThere() throws {
        struct Full: Error {}
        let folder = try TestFolder()
        let place = try folder.write("old", "x.safetensors")
        let failing = TensorPiece(name: "a", type: .f32, shape: [1]) { _ in throw Full() }
        let short = TensorPiece(name: "a", type: .f32, shape: [2]) { try $0(Data(count: 4)) }
        #expect(throws: Full.self) {
            try SafetensorsWriter.write(to: place, pieces: [failing], metadata: [], replace: true)
        }
        #expect(throws: Phi3Error.self) {
            try SafetensorsWriter.write(to: place, pieces: [short], metadata: [], replace: true)
        }
        #expect(throws: Phi3Error.self) {
            try SafetensorsWriter.write(to: place, pieces: [], metadata: [])
        }
        #expect(throws: Phi3Error.self) {
            try SafetensorsWriter.write(to: folder["no/such/folder"], pieces: [], metadata: [])
        }
        #expect(
            try FileManager.default.contentsOfDirectory(atPath: folder.url.path) == [
                "x.safetensors"
            ])
        #expect(try String(contentsOf: place, encoding: .utf8) == "old")
    }

    @Test func aFailedFolderLeavesTheOldOne() throws {
        struct Full: Error {}
        let folder = try TestFolder()
        try folder.write("old", "model/a")
        #expect(throws: Full.self) {
            try FolderWriter.write(to: folder["model"], replace: true) { writer in
                try writer.write(Data("new".utf8), name: "a")
                throw Full()
            }
        }
        #expect(throws: Phi3Error.self) { try FolderWriter.write(to: folder["model"]) { _ in } }
        #expect(try FileManager.default.contentsOfDirectory(atPath: folder.url.path) == ["model"])
        try FolderWriter.write(to: folder["model"], replace: true) {
            try $0.write(Data(), name: "b")
        }
        #expect(try FileManager.default.contentsOfDirectory(atPath: folder["model"].path) == ["b"])
        #expect(try FileManager.default.contentsOfDirectory(atPath: folder.url.path) == ["model"])
    }

    @Test func everyHalfPrecisionNumberSurvives() {
        for bits in UInt16.min...UInt16.max {
            let value = HalfFloat.value(of: bits)
            if value.isNaN { continue }
            #expect(HalfFloat.bits(of: value) == bits)
            #expect(BFloat.bits(of: BFloat.value(of: bits)) == bits || BFloat.value(of: bits).isNaN)
        }
        #expect(HalfFloat.value(of: 0x7E00).isNaN)
        #expect(HalfFloat.value(of: 0x3555) == 0.333251953125)
    }

    @Test func numbersAreRoundedToTheNearestAndTiesToEven() {
        let ulp = Float(sign: .plus, exponent: -10, significand: 1)
        #expect(HalfFloat.bits(of: 1 + ulp / 2) == 0x3C00)
        #expect(HalfFloat.bits(of: 1 + 1.5 * ulp) == 0x3C02)
        #expect(HalfFloat.bits(of: (1 + ulp / 2).nextUp) == 0x3C01)
        #expect(HalfFloat.bits(of: 65519.996) == 0x7BFF)
        #expect(HalfFloat.bits(of: 65520) == 0x7C00)
        #expect(HalfFloat.bits(of: -1e30) == 0xFC00)
        #expect(HalfFloat.bits(of: 3e-8) == 0x0001)
        #expect(HalfFloat.bits(of: 2.98e-8) == 0x0000)
        #expect(BFloat.bits(of: 1.00390625) == 0x3F80)
        #expect(BFloat.bits(of: 1.01171875) == 0x3F82)
        #expect(HalfFloat.value(of: HalfFloat.bits(of: .nan)).isNaN)
        #expect(BFloat.value(of: BFloat.bits(of: .nan)).isNaN)
    }

    @Test func tensorsTellWhetherTheyAreFiniteOrZero() {
        for type in [TensorType.f32, .f16, .bf16] {
            #expect(Tensor([0, -0.0], shape: [2], as: type).isZero)
            #expect(!Tensor([0, 1e-7], shape: [2], as: type).isZero)
            #expect(Tensor([1, -2], shape: [2], as: type).isFinite)
            #expect(!Tensor([1, .infinity], shape: [2], as: type).isFinite)
            #expect(!Tensor([.nan], shape: [1], as: type).isFinite)
        }
        let turned = Tensor([1, 2, 3, 4, 5, 6], shape: [2, 3], as: .f16).transposed()
        #expect(turned.floats() == [1, 4, 2, 5, 3, 6])
        #expect(turned.shape == [3, 2])
    }

    @Test func spoiledFilesNeverCrash() throws {
        var generator = SplitMix(7)
        let whole = try Data(
            contentsOf: FileFixtures.mini.appendingPathComponent("peft_0/adapter_model.safetensors")
        )
        let header = Int(whole.withUnsafeBytes { $0.loadUnaligned(as: UInt64.self) }) + 8
        for _ in 0..<FileFixtures.fuzzCount(1500) {
            let front = Spoiler.bytes(whole.prefix(header), &generator)
            do {
                let read = try SafetensorsHeader(front + whole.dropFirst(header), path: "x")
                let last = read.tensors.values.map(\.range.upperBound).max() ?? 0
                #expect(read.dataStart + last == front.count + whole.count - header)
            } catch {
                #expect(isReadable(error))
            }
        }
    }
}
