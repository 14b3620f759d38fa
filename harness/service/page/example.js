/** A script to start with. */

export const EXAMPLE = `Speaker 1: Good morning, and welcome to Tide Tables, the show about the sea at our door.
Speaker 2: Today's question came from a listener who is six years old. Why is the sea salty, and rivers are not?
Speaker 3: Rivers are, a little. Rain dissolves a trace of salt from the rocks, and every river carries it down.
Speaker 2: So the sea collects it?
Speaker 3: Exactly. The sun takes the water back up and leaves the salt behind. It has done so for a very long time.
Speaker 4: And you can taste the result. I brought four glasses, and nobody is leaving before we have tried them all.
Speaker 1: You heard it. Let us begin with the Baltic.`;
