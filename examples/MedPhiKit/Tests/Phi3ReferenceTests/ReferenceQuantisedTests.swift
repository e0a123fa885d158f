import Foundation
import Phi3Core
import Testing

@testable import Phi3Reference

@Suite struct ReferenceQuantisedTests {
    @Test func quantisedWeightsComputeAsTheirUnpackedNumbers() throws {
        let room = try Fixtures.temporary()
        for form in [
            AffineQuantization.Form(bits: 4, groupSize: 32), .init(bits: 8, groupSize: 64),
        ] {
            let pair = try Quantised.pair(
                of: Fixtures.phi3.appendingPathComponent("mini-4k"), form, in: room)
            let ids = try Expected(Fixtures.phi3.appendingPathComponent("mini-4k")).rows[0]
            let packed = try ReferenceModel.load(pair.packed, options: .init(expandedBytes: 0))
            let logits = try packed.logits(ids)
            #expect(logits == (try ReferenceModel.load(pair.plain).logits(ids)))
            // Groups of 64 do not divide the 96 inputs of the two down projections.
            #expect(packed.checkpoint?.quantizedLayers.count == (form.groupSize == 32 ? 10 : 8))
            try checkSaving(packed, ids, room)
        }
    }

    /// A quantised base keeps its adapter apart, or is unpacked to half precision.
    private func checkSaving(_ base: ReferenceModel, _ ids: [Int32], _ room: TemporaryFolder) throws
    {
        let adapter = Fixtures.phi3.appendingPathComponent("mini-4k/peft_0")
        let model = try base.applyLoRA(adapter, options: AdapterOptions(allowsUnstatedBase: true))
        #expect(throws: Phi3Error.self) { try model.save(room["fused"]) }
        #expect(throws: Phi3Error.self) {
            try model.save(base.url, precision: .half, replace: true)
        }
        try model.save(room["fused"], precision: .half, replace: true)
        let fused = try ReferenceModel.load(room["fused"])
        #expect(fused.config.quantization == nil)
        // Weights are rounded to half precision.
        #expect(largestDifference(try fused.logits(ids), try model.logits(ids)) < 5e-3)
        try base.save(room["base"], replace: true)
        #expect(try ReferenceModel.load(room["base"]).fingerprint == base.fingerprint)
    }
}

/// A checkpoint quantised by a plain rule of this test, and the same numbers unpacked.
private enum Quantised {
    static func pair(
        of source: URL, _ form: AffineQuantization.Form, in room: TemporaryFolder
    ) throws -> (packed: URL, plain: URL) {
        let base = try Checkpoint.open(source)
        var packed: [TensorPiece] = []
        var plain: [TensorPiece] = []
        for (name, tensor) in base.storedTensors() {
            guard tensor.shape.count == 2, tensor.shape[1] % form.groupSize == 0 else {
                packed.append(TensorPiece(name: name, tensor))
                plain.append(TensorPiece(name: name, tensor))
                continue
            }
            let layer = String(name.dropLast(".weight".count))
            let (codes, scales, biases, values) = quantise(tensor.floats(), form)
            let groups = [tensor.shape[0], tensor.shape[1] / form.groupSize]
            packed.append(
                TensorPiece(
                    name: name, type: .u32,
                    shape: [tensor.shape[0], tensor.shape[1] * form.bits / 32]
                ) {
                    try $0(codes)
                })
            packed.append(TensorPiece(name: "\(layer).scales", Tensor(scales, shape: groups)))
            packed.append(TensorPiece(name: "\(layer).biases", Tensor(biases, shape: groups)))
            plain.append(TensorPiece(name: name, Tensor(values, shape: tensor.shape)))
        }
        let places = (packed: room["packed-\(form.bits)"], plain: room["plain-\(form.bits)"])
        let quantization = AffineQuantization(form: form, layers: [:]).section
        var config = try JSONValue(parsing: base.configText).object ?? JSONObject()
        try write(places.plain, config, plain)
        config["quantization"] = quantization
        try write(places.packed, config, packed)
        return places
    }

    private static func write(_ folder: URL, _ config: JSONObject, _ pieces: [TensorPiece]) throws {
        try FolderWriter.write(to: folder) { writer in
            try writer.write(Data(JSONValue.object(config).text().utf8), name: "config.json")
            try SafetensorsWriter.write(
                to: writer.url.appendingPathComponent("model.safetensors"), pieces: pieces,
                metadata: [])
        }
    }

    private static func quantise(
        _ values: [Float], _ form: AffineQuantization.Form
    ) -> (codes: Data, scales: [Float], biases: [Float], values: [Float]) {
        var codes = Data()
        var scales: [Float] = []
        var biases: [Float] = []
        var unpacked: [Float] = []
        for begin in stride(from: 0, to: values.count, by: form.groupSize) {
            let group = values[begin..<begin + form.groupSize]
            let low = group.min() ?? 0
            let step = ((group.max() ?? 0) - low) / Float((1 << form.bits) - 1)
            scales.append(step)
            biases.append(low)
            var byte: UInt8 = 0
            for (index, value) in group.enumerated() {
                let code = UInt8(((value - low) / max(step, 1e-30)).rounded())
                unpacked.append(step * Float(code) + low)
                if form.bits == 8 {
                    codes.append(code)
                } else {
                    byte |= code << (index % 2 == 0 ? 0 : 4)
                    if index % 2 == 1 {
                        codes.append(byte)
                        byte = 0
                    }
                }
            }
        }
        return (codes, scales, biases, unpacked)
    }
}
