// npm install openai zod; with OPENAI_BASE_URL and OPENAI_API_KEY as `orchd openai` prints them
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const River = z.object({ name: z.string().max(40), length_km: z.number().int().min(1).max(9999) });

const messages = [{ role: "user", content: "Describe a river in Europe as JSON with name and length_km." }];
const response_format = zodResponseFormat(River, "river");
const answer = await new OpenAI().chat.completions.parse({ model: "default", messages, response_format });
console.log(answer.choices[0].message.parsed);
