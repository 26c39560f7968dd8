// What llama.cpp computes: logits after each prompt token, with each of the adapters that are asked for.
//
// node logits.mjs NODE_MODULES < {"model": PATH, "tokens": [...], "cases": [{"lora": PATH or null, "scale": 1}]}
// writes one line of JSON: for each case {"logits": [position][token]} or {"error": "..."}.
import path from "node:path";
import {pathToFileURL} from "node:url";

const library = path.join(process.argv[2], "node-llama-cpp", "dist", "index.js");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(library).href);

let input = "";
for await (const part of process.stdin) input += part;
const {model: modelPath, tokens, cases} = JSON.parse(input);

const llama = await getLlama({
    gpu: false, build: "never", skipDownload: true, progressLogs: false, logLevel: LlamaLogLevel.error,
    logger: (level, message) => console.error(level, message)
});
const model = await llama.loadModel({modelPath});

async function evaluate({lora, scale}) {
    const context = await model.createContext({
        contextSize: 64, threads: 1, flashAttention: false,
        experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
        ...(lora == null ? {} : {lora: {adapters: [{filePath: lora, scale}]}})
    });
    try {
        const asked = tokens.map((token) => [token, {generateNext: {logits: true}}]);
        const answers = await context.getSequence().controlledEvaluate(asked);
        return {logits: answers.map(({next}) => tokenOrder(next.logits))};
    } finally {
        await context.dispose();
    }
}

function tokenOrder(logits) {
    return [...logits.entries()].sort(([one], [other]) => one - other).map(([, logit]) => logit);
}

const answers = [];
for (const one of cases) {
    try {
        answers.push(await evaluate(one));
    } catch (error) {
        answers.push({error: String(error.message ?? error)});
    }
}
console.log(JSON.stringify(answers));
await model.dispose();
await llama.dispose();
