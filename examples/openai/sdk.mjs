// npm install openai; with OPENAI_BASE_URL and OPENAI_API_KEY as `orchd openai` prints them
import OpenAI from "openai";

const messages = [{ role: "user", content: "Name a river in Europe." }];
const stream = await new OpenAI().chat.completions.create({ model: "default", messages, stream: true });
for await (const chunk of stream) process.stdout.write(chunk.choices[0].delta.content ?? "");
console.log();
