# The part of run_zygote.py that runs in Julia:
#
#     julia run_zygote.jl GIST.jl FOLDER
#
# Each line of FOLDER/runs.txt is `dtype case config activation eps dims...`, the dimensions in Julia's order. Arrays are
# read from and written to files FOLDER/dtype.case.name and FOLDER/dtype.case.config.name without a header.

include(ARGS[1])

const FOLDER = ARGS[2]
const ACTIVATIONS = Dict("identity" => identity, "relu" => z -> max(z, 0), "tanh" => tanh)

# The layer of a configuration with the given statistics.
function make_layer(activation, eps, parameters, mean, deviation)
    ZygoteBatchNorm(ACTIVATIONS[activation], parameters.beta, parameters.gamma, mean, deviation, eps, 0.1f0)
end

function compute(dtype, case, config, activation, eps, dims)
    T = dtype == "f64" ? Float64 : Float32
    load(name, shape...) = reshape(collect(reinterpret(T, read(joinpath(FOLDER, "$dtype.$case.$name")))), shape...)
    save(name, value) = write(joinpath(FOLDER, "$dtype.$case.$config.$name"), collect(value))

    x_steps, dy = load("x_steps", dims..., 3), load("dy", dims...)
    steps = [collect(selectdim(x_steps, ndims(x_steps), k)) for k in 1:3]
    channels = dims[end - 1]
    parameters = (gamma = load("gamma", channels), beta = load("beta", channels))
    layer(mean, deviation) = make_layer(activation, eps, parameters, mean, deviation)
    initial = layer(zeros(T, channels), ones(T, channels))

    # The "gradients" of the fields μ and σ are the statistics of the batch.
    dropped = []
    for (k, x) in enumerate(steps)
        y, back = Zygote.pullback((l, x) -> l(x), initial, x)
        gradients, dx = back(dy)
        push!(dropped, gradients)
        save("mu_dropped_$k", gradients.μ)
        save("sigma_dropped_$k", gradients.σ)
        k == 1 || continue
        for (name, value) in (("y", y), ("dx", dx), ("dgamma", gradients.γ), ("dbeta", gradients.β))
            save(name, value)
        end
    end
    xhat, back = Zygote.pullback(x -> batchnorm_statistics(initial.μ, initial.σ, initial.ϵ, x), steps[1])
    save("xhat", xhat)
    save("dx_of_xhat", back(dy)[1])

    # Plain calls, by stored statistics: σ is a deviation, also where rvar0 is given for it.
    save("y_eval_init", initial(steps[1]))
    save("y_eval_stored", layer(dropped[1].μ, dropped[1].σ)(steps[1]))
    save("y_eval_r0", layer(load("rmean0", channels), load("rvar0", channels))(steps[1]))
end

for line in eachline(joinpath(FOLDER, "runs.txt"))
    words = split(line)
    compute(words[1:4]..., parse(Float32, words[5]), parse.(Int, words[6:end]))
end
