"""What orders the accesses of a compiled Triton kernel's scratch, read from Triton's own intermediate code and from PTX.

Threads of a program leave numbers for one another in global memory. Which thread has which number is the compiler's choice. A
write and a read of the same place therefore need a barrier between them, or what is written must come from what was read.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple


class Address(NamedTuple):
    """Numbers [low, high) of a row of `base`, but for `variable`, the loop variable that is added."""

    base: str
    low: int
    high: int
    variable: str = ""


class Access(NamedTuple):
    kind: str
    """ "load" or "store"."""
    address: Address
    value: str
    """What is stored, or what was loaded."""
    line: int
    earlier: bool = False
    """Of an earlier iteration of the loop that `variable` belongs to."""


class Operation:
    def __init__(self, line: int, text: str, result: str, variable: str) -> None:
        self.line, self.text, self.result, self.variable = line, text, result, variable
        self.bodies: list[list[Operation]] = []


NAME = r"%[\w@]+"
SAME = ("tt.splat", "tt.broadcast", "ttg.convert_layout", "tt.expand_dims", "arith.extsi", "tt.reshape")


class Code:
    """Operations of a kernel in TTGIR, as a tree, and what defines each value."""

    def __init__(self, ttgir: str) -> None:
        self.operations: list[Operation] = []
        self.definitions: dict[str, str] = {}
        self.carried: dict[str, tuple[str, str]] = {}
        """The first value of what a loop carries on, and the loop's variable."""
        self.loops: dict[str, tuple[int, int]] = {}
        """How far a loop's variable goes from its start, and by how much at a time."""
        stack, scopes = [self.operations], [{}]

        def resolved(text: str) -> str:
            """With the names that are meant here: those of one loop's body may come again in another's."""
            return re.sub(r"%\w+", lambda m: next((s[m[0]] for s in reversed(scopes) if m[0] in s), m[0]), text)

        for number, raw in enumerate(ttgir.splitlines(), 1):
            text = re.sub(r" loc\([^)]*\)+", "", raw.strip())
            if text.startswith("}"):
                stack.pop()
                scopes.pop()
                if text.endswith("{"):
                    stack.append([])
                    stack[-2][-1].bodies.append(stack[-1])
                    scopes.append({})
                continue
            results, inner = {}, {}
            found = re.match(r"((?:%[\w:]+(?:, )?)+) = (.*)", text)
            if found:
                results = {name: f"{name}@{number}" for name in re.findall(r"%\w+", found[1])}
                text = found[2]
            starts = {}
            for opening in ("iter_args(", "scf.while ("):
                if opening in text:
                    carried = text.split(opening)[1].split(")")[0]
                    starts = dict(re.findall(r"(%\w+) = (%\w+)", carried))
                    text = text.replace(carried, "")
            loop = re.match(r"scf\.for (%\w+) = (%\w+) to (%\w+) step (%\w+)", text)
            variable = ""
            if loop:
                begin, end, step = (self.constant(resolved(loop[k])) for k in (2, 3, 4))
                known = begin is not None and end is not None and step is not None
                variable = inner[loop[1]] = f"{loop[1]}@{number}"
                self.loops[variable] = (end - begin - step, step) if known else (0, 0)
            for name, start in starts.items():
                inner[name] = f"{name}@{number}"
                self.carried[inner[name]] = resolved(start), variable
            if text.startswith("^"):
                scopes[-1].update({name: f"{name}@{number}" for name in re.findall(r"%\w+", text)})
            scopes.append(inner)
            text = resolved(text)
            if not text.endswith("{"):
                scopes.pop()
            operation = Operation(number, text, next(iter(results.values()), ""), variable)
            stack[-1].append(operation)
            scopes[-2 if text.endswith("{") else -1].update(results)
            for name in results.values():
                self.definitions[name] = text
            if text.endswith("{"):
                stack.append([])
                operation.bodies.append(stack[-1])

    def constant(self, name: str) -> int | None:
        found = re.match(r"arith\.constant (?:dense<)?(-?\d+)", self.definitions.get(name, ""))
        return int(found[1]) if found else None

    def arguments(self, name: str) -> tuple[str, list[str]]:
        definition = self.definitions.get(name, "")
        return definition.split(" ")[0], re.findall(r"%[\w@]+", definition.split(" : ")[0])

    def span(self, name: str) -> tuple[int, int, str, bool]:
        """Smallest and largest value of an offset but for a loop variable, that variable, and whether it counts rows.

        Rows, programs and sub-steps shift whole records, so that they do not matter.
        """
        operation, arguments = self.arguments(name)
        if name in self.loops:
            return 0, 0, name, False
        if operation == "arith.constant":
            value = self.constant(name) or 0
            return value, value, "", False
        if operation == "tt.make_range":
            end, start = (int(x) for x in re.findall(r"(?:end|start) = (\d+)", self.definitions[name]))
            return start, end - 1, "", True
        if operation in SAME:
            return self.span(arguments[0])
        if operation == "arith.remsi" and self.constant(arguments[1]):
            return 0, (self.constant(arguments[1]) or 1) - 1, "", False
        if operation == "arith.addi":
            (a, b, u, _), (c, d, v, _) = (self.span(x) for x in arguments)
            return a + c, b + d, u or v, False
        if operation == "arith.muli":
            spans = [self.span(x) for x in arguments]
            factors = [self.constant(x) for x in arguments]
            for (low, high, variable, rows), factor in zip(spans, reversed(factors), strict=True):
                if factor is not None and not rows and not variable:
                    return low * factor, high * factor, "", False
        return 0, 0, "", False

    def limit(self, mask: str) -> dict[str, int]:
        """How far a loop's variable goes where the mask is true."""
        operation, arguments = self.arguments(mask)
        if operation in SAME:
            return self.limit(arguments[0])
        if operation == "arith.cmpi" and "slt" in self.definitions[mask] and arguments[0] in self.loops:
            return {arguments[0]: (self.constant(arguments[1]) or 0) - self.loops[arguments[0]][1]}
        return {}

    def address(self, name: str, limit: dict[str, int]) -> Address:
        operation, arguments = self.arguments(name)
        if name in self.carried:
            start, loop = self.carried[name]
            base, low, high, variable = self.address(start, limit)
            return Address(base, low, high + limit.get(loop, self.loops.get(loop, (0, 0))[0]), variable)
        if operation == "tt.addptr":
            base, low, high, variable = self.address(arguments[0], limit)
            a, b, v, _ = self.span(arguments[1])
            return Address(base, low + a, high + b, variable or v)
        if operation in SAME:
            return self.address(arguments[0], limit)
        if operation == "arith.select":
            return self.address(arguments[1], limit)
        return Address(name, 0, 1)

    def comes_from(self, value: str, source: str) -> bool:
        """Whether a value is computed from another."""
        seen, left = set(), [value]
        while left:
            name = left.pop()
            if name == source:
                return True
            if name not in seen:
                seen.add(name)
                left += self.arguments(name)[1]
        return False


def unordered(ttgir: str, scratch: tuple[str, ...]) -> list[tuple[int, int, str]]:
    """Lines of a store and another access of the same place of these arguments that nothing orders, and which it is."""
    code, found = Code(ttgir), set()

    def meet(x: Access, y: Access) -> bool:
        a, b = x.address, y.address
        if a.base != b.base:
            return False
        if a.variable == b.variable and (a.variable or not x.earlier):
            inside = a.low < b.high and b.low < a.high
            # tiles of two iterations are different ones
            return inside and not (x.earlier and a.variable and (a.low, a.high) == (b.low, b.high))
        lengths = [code.loops.get(z.variable, (0, 0))[0] for z in (a, b)]
        return a.low < b.high + lengths[1] and b.low < a.high + lengths[0]

    def access(new: Access, pending: set[Access]) -> None:
        if new.address.base.removeprefix("%") not in scratch:
            return
        for old in pending:
            if "store" in (old.kind, new.kind) and meet(old, new):
                updated = old.kind == "load" and not old.earlier and code.comes_from(new.value, old.value)
                if not updated:
                    found.add((old.line, new.line, f"{old.kind} {old.address} {new.kind} {new.address}"))
        pending.add(new)

    def walk(body: list[Operation], pending: set[Access]) -> set[Access]:
        for operation in body:
            text = operation.text
            if re.search(r"gpu\.barrier|ttg\.barrier", text):
                pending = set()
            elif match := re.match(rf"(tt\.load|tt\.store|ttg\.async_copy_global_to_local) ({NAME})(?:, ({NAME}))?", text):
                mask = re.search(rf"mask ({NAME})", text)
                kind = "store" if match[1] == "tt.store" else "load"
                value = match[3] if kind == "store" else operation.result
                address = code.address(match[2], code.limit(mask[1]) if mask else {})
                access(Access(kind, address, value, operation.line), pending)
            if not operation.bodies:
                continue
            if "scf.if" in text:
                ends = [walk(inner, set(pending)) for inner in operation.bodies]
                pending = set().union(*ends, pending if len(ends) == 1 else set())
            else:
                before = set(pending)
                for _ in range(2 if "scf." in text else 1):
                    for inner in operation.bodies:
                        pending = walk(inner, set(pending))
                    if operation.variable:
                        pending = {x._replace(earlier=x.earlier or x.address.variable == operation.variable) for x in pending}
                # a loop may have no iteration
                pending |= before
        return pending

    walk(code.operations, set())
    return sorted(found)


def copies_over_operands(ptx: str) -> list[int]:
    """Lines that copy to shared memory after matrix units have read it, without a barrier of all warps in between."""
    blocks: dict[str, list[tuple[str, int]]] = {"entry": []}
    follows: dict[str, set[str]] = {"entry": set()}
    current, open_end = "entry", True
    patterns = {"barrier": r"\b(bar|barrier)\.sync", "copy": r"\bcp\.async\.c[ag]", "wait": r"wgmma\.wait_group"}

    def begin(name: str, falls_through: bool) -> None:
        nonlocal current
        blocks.setdefault(name, [])
        follows.setdefault(name, set())
        if falls_through:
            follows[current].add(name)
        current = name

    for number, raw in enumerate(ptx.splitlines(), 1):
        line = raw.strip()
        if label := re.match(r"(\$L__BB\w+):", line):
            begin(label[1], open_end)
            open_end = True
        elif branch := re.match(r"(@!?%p\d+\s+)?bra(?:\.uni)?\s+(\$L__BB\w+)", line):
            follows.setdefault(branch[2], set())
            blocks.setdefault(branch[2], [])
            follows[current].add(branch[2])
            open_end = bool(branch[1])
            if open_end:
                begin(f"after {number}", True)
        else:
            blocks[current] += [(kind, number) for kind, pattern in patterns.items() if re.search(pattern, line)]
    waits = dict.fromkeys(blocks, False)
    found: set[int] = set()
    left: list[Any] = list(blocks)
    while left:
        name = left.pop()
        waited = waits[name]
        for kind, number in blocks[name]:
            if kind == "copy" and waited:
                found.add(number)
            waited = kind == "wait" or (waited and kind != "barrier")
        for other in follows[name]:
            if waited and not waits[other]:
                waits[other] = True
                left.append(other)
    return sorted(found)
